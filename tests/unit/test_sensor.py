"""Engines that somebody else deployed: found, used, and left alone."""

import asyncio
import json
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace

import pytest

from airflow_provider_raylm.compat import AirflowFailException
from airflow_provider_raylm.errors import ClusterError, SpecError
from airflow_provider_raylm.operators.raylm import TeardownEngineOperator, installation
from airflow_provider_raylm.polling import Unreachable
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobsClient
from airflow_provider_raylm.sensors.raylm import EngineSensor
from airflow_provider_raylm.specs.engine import COMMAND_RUN
from airflow_provider_raylm.testing import FakeRayJobs
from airflow_provider_raylm.triggers.raylm import EngineTrigger
from tests.airflows import TaskDeferred
from tests.unit.test_ray_jobs import dashboard

HERE = installation()


@pytest.fixture
def fake():
    """A cluster with engines of two DAGs' runs, and of another Airflow."""
    fake = FakeRayJobs()
    deploy(fake, "scheduled__2026-01-01", "nightly")
    deploy(fake, "scheduled__2026-01-02", "nightly")
    deploy(fake, "scheduled__2026-01-03", "weekly")
    deploy(fake, "scheduled__2026-01-04", "nightly", engine="other")
    deploy(fake, "scheduled__2026-01-05", "nightly", installation="elsewhere")
    return fake


def deploy(fake, run_id, dag_id, engine="shared", installation=HERE):
    labels = {"installation": installation, "dag_id": dag_id, "run_id": run_id, "engine": engine}
    payload = {"engine": {"name": engine.partition("[")[0], "model": "m"}, "labels": labels, "replace": False}
    assert fake.submit(JobRequest(run_id, "deploy", payload))


def poke(fake, **arguments):
    with fake.installed():
        return EngineSensor(task_id="find", engine="shared", **arguments).poke({})


def test_the_latest_is_the_one_that_was_deployed_last(fake):
    """Whatever its run is called."""
    deploy(fake, "manual__2026-01-02", "nightly")

    assert poke(fake, owner_dag_id="nightly").xcom_value["labels"]["run_id"] == "manual__2026-01-02"


def test_an_engine_that_a_command_has_deployed_for_itself_is_not_found(fake):
    """It is torn down with the preview that it is for, whoever works on it."""
    deploy(fake, f"{COMMAND_RUN}0a1b2c", "nightly")

    assert poke(fake, owner_dag_id="nightly").xcom_value["labels"]["run_id"] == "scheduled__2026-01-02"


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


def test_a_dashboard_that_does_not_answer_is_waited_for(fake, monkeypatch):
    def running_engines():
        raise Unreachable("no answer")

    monkeypatch.setattr(fake, "running_engines", running_engines)
    assert not poke(fake).is_done


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_name_that_no_engine_has_is_not_waited_for(fake, deferrable):
    """Nor tried again; one of a mapped group's instances is one."""
    deploy(fake, "mapped", "nightly", engine="e[0]")
    with pytest.raises(SpecError, match=r"EngineSpec\.name"):
        EngineSensor(task_id="find", engine="not a name")
    sensor = EngineSensor(task_id="find", engine="{{ params.engine }}", deferrable=deferrable)
    sensor.engine = "not a name"
    with fake.installed():
        with pytest.raises(AirflowFailException, match=r"EngineSpec\.name"):
            sensor.execute({})
        found = EngineSensor(task_id="mapped", engine="e[0]", deferrable=deferrable).execute({})
    assert found["labels"]["engine"] == "e[0]"


def test_it_waits_without_a_worker(fake):
    """The engine comes later; what is found is the same."""
    sensor = EngineSensor(
        task_id="find", engine="late", owner_dag_id="nightly", deferrable=True, poke_interval=0.01, timeout=60
    )

    async def found(trigger):
        events = trigger.run()
        looking = asyncio.create_task(anext(events))
        await asyncio.sleep(0.1)
        assert not looking.done()
        deploy(fake, "late", "nightly", engine="late")
        return (await looking).payload

    with fake.installed():
        with pytest.raises(TaskDeferred) as deferred:
            sensor.execute({})
        path, arguments = deferred.value.trigger.serialize()
        event = asyncio.run(found(EngineTrigger(**arguments)))
        result = sensor.resume({}, event)

    assert (path, deferred.value.timeout) == (
        "airflow_provider_raylm.triggers.raylm.EngineTrigger",
        timedelta(seconds=60),
    )
    assert result["application"] in fake.engines
    assert result["labels"]["engine"] == "late"


def test_an_engine_that_is_there_needs_no_waiting(fake):
    sensor = EngineSensor(task_id="find", engine="shared", owner_dag_id="weekly", deferrable=True)
    with fake.installed():
        assert sensor.execute({})["labels"]["dag_id"] == "weekly"


def test_a_refused_token_ends_the_wait(fake, monkeypatch):
    """It will be refused the next time, too."""

    def running_engines():
        raise ClusterError("refused")

    monkeypatch.setattr(fake, "running_engines", running_engines)
    query = EngineSensor(task_id="find", engine="shared").query.model_dump()

    async def fired():
        return [event.payload async for event in EngineTrigger("raylm_default", query, 0.01).run()]

    with fake.installed():
        (event,) = asyncio.run(fired())
    with pytest.raises(ClusterError, match="^refused$"):
        EngineSensor(task_id="find", engine="shared").resume({}, event)


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
