"""What deploying decides without a cluster: what is asked for, what lacks, why a start failed, when a lease is over."""

from types import SimpleNamespace

import pytest
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from airflow_provider_raylm.cluster import engine
from airflow_provider_raylm.cluster.engine import root_cause
from airflow_provider_raylm.cluster.lease import TimeSheet, expiry
from airflow_provider_raylm.cluster.llm import PLACEMENT, llm_config
from airflow_provider_raylm.cluster.resources import bundles, shortage
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.specs import EngineRef, EngineSpec, Labels, Lease

GPU_NODE = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 1e9}
CPU_NODE = {"CPU": 8.0, "memory": 1e9}


REF = EngineRef(
    application="a",
    deployment="engine",
    model="m",
    fingerprint="f",
    labels=Labels(installation="i", dag_id="d", run_id="r", engine="e"),
    lease=Lease(),
)


def spec(**fields):
    return EngineSpec(name="e", model="m", **fields)


def test_an_engine_that_comes_back_is_waited_for(monkeypatch):
    """Said once; one that failed to deploy is not waited for, and nor is one that is not there."""
    states = ["UNHEALTHY", "UNHEALTHY", "UNHEALTHY", "DEPLOYING", "DEPLOYING", "RUNNING"]
    said = []

    def status(application):
        state = states.pop(0) if len(states) > 1 else states[0]
        return state and SimpleNamespace(status=ApplicationStatus(state), deployments={}, message="why.")

    monkeypatch.setattr(engine, "_status", status)
    monkeypatch.setattr(engine, "POLL_PERIOD_S", 0.01)
    engine.wait_until_running(REF, 5, said.append)
    assert [line.partition(";")[0] for line in said] == ["the engine is not well: UNHEALTHY, unhealthy"]

    states[:] = ["DEPLOY_FAILED"]
    with pytest.raises(EngineError, match=r"a is DEPLOY_FAILED: why\. Clear the deploy task"):
        engine.wait_until_running(REF, 5, said.append)
    states[:] = ["UNHEALTHY"]
    with pytest.raises(EngineError, match="a is UNHEALTHY"):
        engine.wait_until_running(REF, 0.05, said.append)
    states[:] = [None]
    with pytest.raises(EngineError, match="a is gone"):
        engine.wait_until_running(REF, 5, said.append)


def test_an_engine_that_was_replaced_is_not_taken_for_the_first(monkeypatch):
    """Its answers would be mixed with those of another model."""
    running = SimpleNamespace(status=ApplicationStatus.RUNNING, deployments={"engine": 0, "lease-other": 0})
    monkeypatch.setattr(engine, "_status", lambda application: running)

    with pytest.raises(EngineError, match=r"is another engine by now \(fingerprint other, this task's f\).*Clear this"):
        engine.wait_until_running(REF, 5, print)


def test_only_an_engine_that_is_gone_is_deployed_again(monkeypatch):
    """Under its old labels, for a short while, and not deleted by a task that only joined."""
    deployed = []
    states = ["RUNNING", "UNHEALTHY", "DEPLOYING", "DELETING", None]
    monkeypatch.setattr(engine, "deploy", lambda *args, **kwargs: deployed.append((args, kwargs)))
    for state in states:
        status = state and SimpleNamespace(status=ApplicationStatus(state), deployments={"lease-f": 0})
        monkeypatch.setattr(engine, "_status", lambda application, status=status: status)
        engine.redeploy(spec(), REF, lambda line: None)

    (args, kwargs), _ = deployed
    assert len(deployed) == 2
    assert args == (spec(lease=Lease(idle_timeout=300)), REF.labels)
    assert (kwargs["replace"], kwargs["owned"]) == (False, False)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("RUNNING", r"The engine is running\. Retry the task: it goes on with the rows that are missing"),
        ("UNHEALTHY", r"may come back\. Retry the task: it waits for the engine and goes on with the rows"),
        ("DEPLOY_FAILED", r"is DEPLOY_FAILED: why\. Clear the deploy task together with this one"),
        (None, r"is gone: .* Clear the deploy task together with this one"),
    ],
)
def test_a_failed_call_says_what_to_do(monkeypatch, state, sentence):
    """By what has become of the engine."""
    status = state and SimpleNamespace(status=ApplicationStatus(state), deployments={}, message="why.")
    monkeypatch.setattr(engine, "_status", lambda application: status)

    with pytest.raises(EngineError, match=sentence), engine.explained("a"):
        raise RayServeException("the replica is gone")


def test_what_a_replica_asks_for():
    """One bundle per worker, the first with the replica's own CPUs; on CPUs it is all one process' business."""
    assert bundles(spec()) == [{"GPU": 1, "CPU": 1}]
    assert bundles(spec(gpus=0, cpus=4, tensor_parallel_size=2)) == [{"CPU": 4}]
    assert bundles(spec(tensor_parallel_size=2, accelerator_type="H100", cpus=2)) == [
        {"GPU": 1, "CPU": 2, "accelerator_type:H100": 0.001},
        {"GPU": 1, "accelerator_type:H100": 0.001},
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gpus": 0, "cpus": 4},
        {"gpus": 0.5},
        {"tensor_parallel_size": 2, "accelerator_type": "H100", "cpus": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
)
def test_ray_asks_for_the_same(fields, monkeypatch):
    """The driver deploys without Ray's own translation, which the replica's engine then relies on."""
    from ray.serve.llm.deployment import LLMServer

    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    options = LLMServer.get_deployment_options(llm_config(spec(**fields)))
    asked = [
        {name: amount for name, amount in bundle.items() if amount} for bundle in options["placement_group_bundles"]
    ]
    assert (asked, options["placement_group_strategy"]) == (bundles(spec(**fields)), PLACEMENT)


@pytest.mark.parametrize(
    ("fields", "nodes", "lacks"),
    [
        ({}, [GPU_NODE], None),
        ({"tensor_parallel_size": 4}, [GPU_NODE, GPU_NODE], None),
        ({"gpus": 0, "cpus": 8}, [CPU_NODE], None),
        ({"gpus": 0.5, "replicas": 4}, [GPU_NODE], None),
        ({"replicas": (1, 9)}, [GPU_NODE], None),
        ({}, [CPU_NODE], "asks for 1 CPU, 1 GPU; the cluster has 8 CPU, 0 GPU in total"),
        (
            {"replicas": 3},
            [GPU_NODE],
            "asks for 3 CPU, 3 GPU in 3 parts of 1 CPU, 1 GPU; the cluster has 16 CPU, 2 GPU",
        ),
        ({"accelerator_type": "B200"}, [GPU_NODE], "asks for 1 CPU, 1 GPU, B200; the cluster has 16 CPU, 2 GPU, H100"),
        ({"gpus": 0, "cpus": 12}, [CPU_NODE, CPU_NODE], "the cluster has 16 CPU, 0 GPU in total, its nodes 8 CPU"),
        ({}, [], "the cluster has 0 GPU in total"),
    ],
)
def test_what_a_cluster_lacks(fields, nodes, lacks):
    """In total, or on any one node; with what was asked, what there is, and what to change."""
    said = shortage(spec(**fields), nodes)

    assert said is None if lacks is None else lacks in said
    assert said is None or "scale_up_timeout" in said


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (
            'The deployment failed to start 1 times in a row.\nTraceback (most recent call last):\n  File "x"\n'
            "airflow_provider_raylm.errors.EngineError: OSError: no model here\n",
            "OSError: no model here",
        ),
        ("Traceback:\n  File x\nValueError: first\n\nRuntimeError: second\n", "RuntimeError: second"),
        ("no traceback at all", "no traceback at all"),
    ],
)
def test_the_sentence_that_says_why(message, cause):
    """A reader wants the cause, not the traceback."""
    assert root_cause(message) == cause


def test_whom_an_engines_time_goes_to():
    """Loading until it is up; then to those who work, in equal shares, or to nobody. Nothing is lost."""
    sheet = TimeSheet(100.0)
    for now, working in [(160.0, []), (160.0, ["early"])]:
        sheet.advance(now, working)
    sheet.up()
    for now, working in [(170.0, []), (200.0, ["a"]), (220.0, ["a", "b"]), (215.0, ["b"]), (230.0, [])]:
        sheet.advance(now, working)
    spent = sheet.spent()

    assert (spent.loading, spent.idle) == (60.0, 20.0)
    assert {task: seconds for task, seconds in spent.tasks.items() if seconds} == {"a": 40.0, "b": 10.0}
    assert spent.loading + spent.idle + sum(spent.tasks.values()) == 230.0 - 100.0


def test_when_a_lease_is_over():
    """Idle for too long, or too old, busy or not; until then it holds."""
    bounds = Lease(idle_timeout=10, max_lifetime=100)

    assert expiry(bounds, deployed_at=0, renewed_at=50, now=59.9) is None
    assert "idle_timeout (10 s)" in expiry(bounds, deployed_at=0, renewed_at=50, now=60)
    assert expiry(bounds, deployed_at=0, renewed_at=99, now=99.9) is None
    assert "max_lifetime (100 s)" in expiry(bounds, deployed_at=0, renewed_at=99, now=100)
    # An engine that is still loading counts as busy until its deploy timeout.
    assert expiry(bounds, deployed_at=0, renewed_at=60, now=30) is None
