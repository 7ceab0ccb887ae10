"""Engines that somebody else deployed: found, used, and left alone."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
from airflow.sdk import conf

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.raylm import TeardownEngineOperator
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobsClient
from airflow_provider_raylm.sensors.raylm import EngineSensor
from airflow_provider_raylm.testing import FakeRayJobs
from tests.unit.test_ray_jobs import dashboard

HERE = str(conf.get("api", "base_url", fallback=None) or "http://localhost:8080")


@pytest.fixture
def fake():
    """A cluster with engines of two DAGs' runs, and of another Airflow."""
    fake = FakeRayJobs()
    for number, owner in enumerate(
        [
            (HERE, "nightly", "scheduled__2026-01-01", "shared"),
            (HERE, "nightly", "scheduled__2026-01-02", "shared"),
            (HERE, "weekly", "scheduled__2026-01-03", "shared"),
            (HERE, "nightly", "scheduled__2026-01-04", "other"),
            ("elsewhere", "nightly", "scheduled__2026-01-05", "shared"),
        ]
    ):
        labels = dict(zip(("installation", "dag_id", "run_id", "engine"), owner, strict=True))
        payload = {"engine": {"name": labels["engine"], "model": "m"}, "labels": labels, "replace": False}
        assert fake.submit(JobRequest(str(number), "deploy", payload))
    return fake


def poke(fake, **arguments):
    with fake.installed():
        return EngineSensor(task_id="find", engine="shared", **arguments).poke({})


@pytest.mark.parametrize(
    ("arguments", "run_id"),
    [
        ({}, "scheduled__2026-01-03"),
        ({"owner_dag_id": "nightly"}, "scheduled__2026-01-02"),
        ({"owner_run_id": "scheduled__2026-01-01"}, "scheduled__2026-01-01"),
        ({"owner_installation": "elsewhere"}, "scheduled__2026-01-05"),
    ],
)
def test_the_latest_that_fits_is_found(fake, arguments, run_id):
    found = poke(fake, **arguments)

    assert found.is_done
    assert found.xcom_value["labels"]["run_id"] == run_id
    assert found.xcom_value["application"] in fake.engines


def test_none_that_fits_is_waited_for(fake):
    assert not poke(fake, owner_dag_id="hourly").is_done


@pytest.mark.parametrize("arguments", [{"owner_dag_id": "weekly"}, {"owner_installation": "elsewhere"}])
def test_its_owner_alone_tears_it_down(fake, arguments):
    found = poke(fake, **arguments).xcom_value
    teardown = TeardownEngineOperator(task_id="teardown", engine=found)

    with pytest.raises(SpecError, match=r"belongs to the DAG \w+ of .* Only that one deploys it"):
        teardown.command({"ti": SimpleNamespace(dag_id="nightly", run_id="r")})


def test_only_engines_that_take_work_count():
    """Not one that starts, another's application, or one that says what this version does not understand."""
    labels = {"installation": "i", "dag_id": "d", "run_id": "r", "engine": "e"}
    ref = {"application": "forged", "deployment": "engine", "model": "m", "fingerprint": "f", "labels": labels}

    def application(about, status="RUNNING"):
        keeper = {"deployment_config": {"name": "lease-f", **({"user_config": about} if about else {})}}
        return {"status": status, "deployments": {"engine": {"deployment_config": {}}, "lease-f": keeper}}

    applications = {
        "raylm-e-1": application({**ref, "lease": {}}),
        "raylm-e-2": application({**ref, "lease": {}}, status="DEPLOYING"),
        "raylm-e-3": application({**ref, "lease": {"of": "another version"}}),
        "raylm-e-4": application(None),
        "theirs": application({**ref, "lease": {}}),
    }
    with dashboard(body=json.dumps({"applications": applications})) as (url, _), closing(RayJobsClient(url)) as jobs:
        (found,) = jobs.running_engines()

    assert (found.application, found.dashboard_url) == ("raylm-e-1", url)
