"""Deploying: adopt what is there, say why it cannot be, leave nothing behind."""

import time
from contextlib import closing

import httpx
import pytest

import airflow_provider_raylm.wire as wire
from airflow_provider_raylm.errors import ClusterError, EngineError
from airflow_provider_raylm.naming import APPLICATION_PREFIX
from tests.chaos.scripted_engine import scripted
from tests.conftest import LABELS, REPOSITORY

OTHER = {**LABELS, "run_id": "another run"}


def deploy(cluster, spec, labels=OTHER, replace=False):
    return cluster.run("deploy", {"engine": spec, "labels": labels, "replace": replace})


def engines(cluster):
    """Return the engines on the cluster, whoever's and in whatever state, as Serve itself shows them."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    response = httpx.get(f"{cluster.url}/api/serve/applications/", headers=headers, timeout=60).raise_for_status()
    return [name for name in response.json()["applications"] if name.startswith(APPLICATION_PREFIX)]


def test_it_is_found_without_a_job(cluster, engine):
    """By whoever looks at the dashboard, with all that a task needs to use it."""
    with closing(cluster.client()) as jobs:
        (found,) = jobs.running_engines()

    assert found.dashboard_url == cluster.url
    differing = {"dashboard_url": "", "deploy_seconds": engine["deploy_seconds"]}
    assert found.model_copy(update=differing).model_dump(mode="json") == engine


def test_an_equal_engine_is_adopted_and_another_refused(cluster, engine, engine_spec):
    """The name belongs to the run; waiting times do not matter, the model does."""
    adopted = deploy(cluster, {**engine_spec, "deploy_timeout": 77}, LABELS)

    assert adopted["adopted"] is True
    assert {adopted[name] == engine[name] for name in ("application", "fingerprint", "model")} == {True}
    with pytest.raises(EngineError, match=r"running with another spec.*replace=True"):
        deploy(cluster, {**engine_spec, "served_model_name": "other"}, LABELS)


def test_a_model_that_is_not_there(cluster, engine, engine_spec):
    """vLLM's own reason, and nothing left on the cluster."""
    with pytest.raises(EngineError, match=r"did not start \(DEPLOY_FAILED\).*/no/such/model"):
        deploy(cluster, {**engine_spec, "model": "/no/such/model"})
    assert engines(cluster) == [engine["application"]]


def test_an_engine_argument_that_vllm_does_not_know(cluster, engine, engine_spec):
    """By its name."""
    with pytest.raises(EngineError, match="no_such_argument"):
        deploy(cluster, {**engine_spec, "engine_kwargs": {"no_such_argument": 1}})
    assert engines(cluster) == [engine["application"]]


def test_a_secret_that_is_not_there(cluster, engine, engine_spec):
    """By its file's name, before vLLM starts."""
    with pytest.raises(EngineError, match="secret_env: cannot read /no/such/secret"):
        deploy(cluster, {**engine_spec, "secret_env": {"HF_TOKEN": "/no/such/secret"}})
    assert engines(cluster) == [engine["application"]]


def test_more_than_the_cluster_has(cluster, engine, engine_spec):
    """Said within a minute, with what was asked and what there is."""
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"asks for 0\.5 CPU, 8 GPU.*the cluster has 2 CPU, 0 GPU"):
        deploy(cluster, {**engine_spec, "gpus_per_worker": 1, "tensor_parallel_size": 8, "scale_up_timeout": 5})

    assert time.monotonic() - started < 60
    assert engines(cluster) == [engine["application"]]


def test_two_runs_have_an_engine_each(cluster, engine, engine_spec, source, tmp_path):
    """Both up at a time; tearing one down leaves the other at work. It comes back, once, for tasks that ask for it."""
    # Without vLLM, to be quick: it starts twice.
    without = scripted(cluster)
    other = deploy(without, engine_spec)
    assert other["application"] != engine["application"]
    assert sorted(engines(cluster)) == sorted([engine["application"], other["application"]])

    def request(ref, name):
        batch = {"source": f"{source}/0.parquet", "prompt": "${text}", "max_tokens": 2, "output": str(tmp_path / name)}
        return {"engine": ref, "batch": batch}

    def infer(ref, name):
        return cluster.run("infer", request(ref, name))["rows_written"]

    assert infer(other, "a") > 0
    torn_down = cluster.run("teardown", {"application": other["application"]})
    assert (torn_down["existed"], torn_down["resources_free"], torn_down["usage"]["tasks"]) == (True, True, 1)
    assert infer(engine, "c") > 0
    with pytest.raises(EngineError, match=r"is gone.*Clear the deploy task"):
        infer(other, "d")
    assert infer(other, "a") == 0, "complete already: no engine is needed"

    jobs = [without.start("infer", {**request(other, name), "redeploy": engine_spec}) for name in ("d", "e")]
    ended = [cluster.finish(job) for job in jobs]
    assert [report["rows_written"] > 0 for report, _ in ended] == [True, True]
    said = [line for _, lines in ended for line in lines]
    assert any("deploying it again" in line for line in said)
    assert sum(line.startswith("deploying raylm-") for line in said) == 1
    assert cluster.run("teardown", {"application": other["application"]})["usage"]["tasks"] == 2


def test_a_sweep_sees_only_its_own_installation(cluster, engine):
    """An engine of another Airflow is neither listed nor deleted, even by name."""
    sweep = {"delete": [engine["application"]], "max_age": 0, "installation": "somebody else"}
    assert cluster.run("sweep", sweep) == {"engines": [], "deleted": []}
    assert engines(cluster) == [engine["application"]]
    own = cluster.run("sweep", {"delete": [], "max_age": None, "installation": LABELS["installation"]})
    assert [one["application"] for one in own["engines"]] == [engine["application"]]


def test_the_lease_knows_who_works_and_deletes_its_application(cluster):
    """A teardown waits for who works; when nobody does, the lease ends it. Without vLLM, to be quick."""
    log = cluster.run_script(REPOSITORY / "tests" / "integration" / "lease_job.py")

    assert "refused: raylm-lease-test is at work on out2. Run the teardown again" in log
    assert "raylm-lease-test is at work on out2: waiting until it is done, at most 60 s" in log
    assert "waited: True" in log
    assert "renewed: there, left alone: gone" in log


def test_another_version_on_the_cluster(cluster, monkeypatch):
    """Both versions, and what to do."""
    monkeypatch.setattr(wire, "__version__", "9.9")
    monkeypatch.setattr("airflow_provider_raylm.ray_jobs.__version__", "9.9")

    with pytest.raises(
        ClusterError, match=r"worker runs airflow-provider-raylm 9\.9, the cluster 0\.1\.0.*ship_package"
    ):
        cluster.run("sweep", {"delete": [], "max_age": None, "installation": "x"}, ship_package=False)


def test_no_package_on_the_cluster(cluster, tmp_path):
    """The interpreter has Ray, but not this package."""
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\nexec /usr/bin/env python3 -S -I "$@"\n')
    bare.chmod(0o755)

    with pytest.raises(ClusterError, match=r"does not have the package airflow-provider-raylm.*pip install --no-deps"):
        cluster.run("sweep", {}, ship_package=False, python=str(bare))


def test_a_wrong_token(cluster):
    """Names the address and where the token belongs."""
    for token in (None, "wrong"):
        with (
            closing(cluster.client(token=token)) as jobs,
            pytest.raises(ClusterError, match=r"40[13].*connection's password"),
        ):
            jobs.ray_version()
