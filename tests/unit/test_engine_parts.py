"""What deploying decides without a cluster: what is asked for, what lacks, why a start failed, when a lease is over."""

import asyncio
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from airflow_provider_raylm.cluster import surroundings
from airflow_provider_raylm.cluster.engine import applications, deploy, lease, leases, retire, status
from airflow_provider_raylm.cluster.engine.deploy import root_cause
from airflow_provider_raylm.cluster.engine.lease import LeaseKeeper, TimeSheet, expiry
from airflow_provider_raylm.cluster.engine.llm import PLACEMENT, llm_config, llm_deployment
from airflow_provider_raylm.cluster.engine.resources import bundles, shortage
from airflow_provider_raylm.cluster.surroundings import Surroundings
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.naming import fingerprint
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


LABELS = REF.labels.model_dump()


def until(condition, timeout=5):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "not so in time"
        time.sleep(0.01)


def spec(**fields):
    return EngineSpec(name="e", model="m", **fields)


def test_an_engine_that_was_created_this_moment_is_adopted(monkeypatch):
    """Serve shows no deployment of it yet; one whose application never gets any is somebody else's."""
    mark = fingerprint(spec())
    there = [{}, {}, {f"lease-{mark}": None, "engine": None}]

    def found(name):
        return SimpleNamespace(status=ApplicationStatus.DEPLOYING, deployments=there.pop(0) if there else {})

    monkeypatch.setattr(applications, "status_of", found)
    monkeypatch.setattr(applications, "POLL_PERIOD_S", 0.01)
    monkeypatch.setattr(applications, "DEPLOYMENTS_TIMEOUT_S", 0.1)
    assert deploy._settle("a", spec(), mark, replace=False, say=print) is True
    with pytest.raises(EngineError, match=r"running with another spec \(fingerprint None"):
        deploy._settle("a", spec(), mark, replace=False, say=print)


def test_what_a_deploy_waits_for_does_not_count_against_its_engine(monkeypatch):
    """Another job's turn, or an engine that has to go first, may take ten minutes; the engine has all of its time."""
    now = [1_000.0]
    began = []

    def settle(name, spec, mark, replace, say):
        now[0] += 700
        return True

    monkeypatch.setattr(deploy, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time, sleep=time.sleep))
    monkeypatch.setattr(deploy, "_settle", settle)
    monkeypatch.setattr(deploy, "_wait_until_running", lambda name, spec, started, say: began.append(started))
    for part in ("_start_serve", "_begin_lease"):
        monkeypatch.setattr(deploy, part, lambda *_: None)
    for part in ("_turn", "_awaited", "_deleted_on_failure"):
        monkeypatch.setattr(deploy, part, lambda name: nullcontext())
    ref = deploy.deploy(spec(), REF.labels, replace=False, say=print)

    assert began == [1_700]
    assert ref.deploy_seconds == 700


def test_an_engine_that_comes_back_is_waited_for(monkeypatch):
    """Said once; one that failed to deploy is not waited for, and nor is one that is not there."""
    states = ["UNHEALTHY", "UNHEALTHY", "UNHEALTHY", "DEPLOYING", "DEPLOYING", "RUNNING"]
    said = []

    def found(application):
        state = states.pop(0) if len(states) > 1 else states[0]
        return state and SimpleNamespace(status=ApplicationStatus(state), deployments={}, message="why.")

    monkeypatch.setattr(applications, "status_of", found)
    monkeypatch.setattr(applications, "POLL_PERIOD_S", 0.01)
    status.wait_until_running(REF, 5, said.append)
    assert [line.partition(";")[0] for line in said] == ["the engine is not well: UNHEALTHY, unhealthy"]

    states[:] = ["DEPLOY_FAILED"]
    with pytest.raises(EngineError, match=r"a is DEPLOY_FAILED: why\. Clear the deploy task"):
        status.wait_until_running(REF, 5, said.append)
    states[:] = ["UNHEALTHY"]
    with pytest.raises(EngineError, match="a is UNHEALTHY"):
        status.wait_until_running(REF, 0.05, said.append)
    states[:] = [None]
    with pytest.raises(EngineError, match="a is gone"):
        status.wait_until_running(REF, 5, said.append)


def test_an_engine_that_was_replaced_is_not_taken_for_the_first(monkeypatch):
    """Its answers would be mixed with those of another model."""
    running = SimpleNamespace(status=ApplicationStatus.RUNNING, deployments={"engine": 0, "lease-other": 0})
    monkeypatch.setattr(applications, "status_of", lambda application: running)

    with pytest.raises(EngineError, match=r"is another engine by now \(fingerprint other, this task's f\).*Clear this"):
        status.wait_until_running(REF, 5, print)


def test_only_an_engine_that_is_gone_is_deployed_again(monkeypatch):
    """Under its old labels, for a short while, and not deleted by a task that only joined."""
    deployed = []
    states = ["RUNNING", "UNHEALTHY", "DEPLOYING", "DELETING", None]
    monkeypatch.setattr(deploy, "deploy", lambda *args, **kwargs: deployed.append((args, kwargs)))
    for state in states:
        found = state and SimpleNamespace(status=ApplicationStatus(state), deployments={"lease-f": 0})
        monkeypatch.setattr(applications, "status_of", lambda application, found=found: found)
        deploy.redeploy(spec(), REF, lambda line: None)

    (args, kwargs), _ = deployed
    assert len(deployed) == 2
    assert args == (spec(lease=Lease(idle_timeout=300)), REF.labels)
    assert (kwargs["replace"], kwargs["owned"]) == (False, False)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("RUNNING", r"The engine is running\. Retry the task: it continues with the missing rows"),
        ("UNHEALTHY", r"may come back\. Retry the task: it waits for the engine and continues with the missing rows"),
        ("DEPLOY_FAILED", r"is DEPLOY_FAILED: why\. Clear the deploy task together with this one"),
        (None, r"is gone: .* Clear the deploy task together with this one"),
    ],
)
def test_a_failed_call_says_what_to_do(monkeypatch, state, sentence):
    """By what has become of the engine."""
    found = state and SimpleNamespace(status=ApplicationStatus(state), deployments={}, message="why.")
    monkeypatch.setattr(applications, "status_of", lambda application: found)

    with pytest.raises(EngineError, match=sentence), status.explained("a"):
        raise RayServeException("the replica is gone")


def test_what_a_replica_asks_for():
    """One bundle per worker, the first with the replica's own CPUs; on CPUs it is all one process' business."""
    assert bundles(spec()) == [{"GPU": 1, "CPU": 1}]
    assert bundles(spec(gpus_per_worker=0, num_cpus=4, tensor_parallel_size=2)) == [{"CPU": 4}]
    assert bundles(spec(tensor_parallel_size=2, accelerator_type="H100", num_cpus=2)) == [
        {"GPU": 1, "CPU": 2, "accelerator_type:H100": 0.001},
        {"GPU": 1, "accelerator_type:H100": 0.001},
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gpus_per_worker": 0, "num_cpus": 4},
        {"gpus_per_worker": 0.5},
        {"tensor_parallel_size": 2, "accelerator_type": "H100", "num_cpus": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"gpus_per_worker": 0.6, "tensor_parallel_size": 2, "accelerator_type": "A100"},
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


def deployed(monkeypatch, **fields):
    """What the driver gives to Serve."""
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(runtime_env={"py_modules": ["p"]}))
    return llm_deployment(spec(**fields))._bound_deployment


def test_a_replica_has_what_its_job_was_given(monkeypatch):
    """The engine's own variables go over it; a secret stays a file's name."""
    given = Surroundings({"A": "job", "B": "job", "S": "job"}, {"T": "/run/t", "B2": "/run/b"})
    monkeypatch.setattr(surroundings, "_entered", given)
    deployment = deployed(monkeypatch, env={"A": "engine", "B2": "engine"}, secret_env={"S": "/run/s"})
    env_vars = deployment.ray_actor_options["runtime_env"]["env_vars"]

    assert {name: env_vars.get(name) for name in "ABST"} == {"A": "engine", "B": "job", "S": None, "T": None}
    (loaded,) = deployment.init_args
    assert loaded["secret_env"] == {"T": "/run/t", "S": "/run/s"}


@pytest.mark.parametrize("fields", [{}, {"gpus_per_worker": 0.3}, {"gpus_per_worker": 0.6, "tensor_parallel_size": 2}])
def test_a_worker_of_vllm_fits_into_its_bundle(fields, monkeypatch):
    """Whichever of vLLM's executors asks: it does so in the environment that the driver gives to the replica."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

    deployment = deployed(monkeypatch, env={"A": "b"}, **fields)
    runtime_env = deployment.ray_actor_options["runtime_env"]
    assert (runtime_env["py_modules"], runtime_env["env_vars"].pop("A")) == (["p"], "b")
    for name, value in runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU")

    asked = deployment._replica_config
    assert (asked.placement_group_bundles, asked.placement_group_strategy) == (bundles(spec(**fields)), "PACK")
    assert {bundle["GPU"] for bundle in asked.placement_group_bundles} == {envs.VLLM_RAY_PER_WORKER_GPUS}
    assert RayExecutorV2._get_actor_resource_kwargs() == {"num_gpus": spec(**fields).gpus_per_worker}


def test_an_engine_on_a_part_of_a_gpu_takes_that_part_of_its_memory():
    """Unless it is told how much; vLLM's default, for a whole GPU, leaves nothing to the next engine."""
    assert llm_config(spec(gpus_per_worker=0.5)).engine_kwargs["gpu_memory_utilization"] == 0.46
    some = {"gpu_memory_utilization": 0.2}
    assert llm_config(spec(gpus_per_worker=0.5, engine_kwargs=some)).engine_kwargs["gpu_memory_utilization"] == 0.2
    for gpus in (0, 1):
        assert "gpu_memory_utilization" not in llm_config(spec(gpus_per_worker=gpus)).engine_kwargs


def test_the_share_of_memory_is_vllms_own():
    from vllm import EngineArgs

    assert (
        llm_config(spec(gpus_per_worker=0.5)).engine_kwargs["gpu_memory_utilization"] * 2
        == EngineArgs.gpu_memory_utilization
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h100", "Is it H100?"),
        ("A10", "Is it A100 or A100-40G or A100-80G or A10G?"),
        ("NVIDIA H100 80GB", "Is it H100?"),
        ("AMD-Instinct-MI350", "Is it AMD-Instinct-MI350X-OAM?"),
        ("MI300X", "Is it AMD-Instinct-MI300X-HF or AMD-Instinct-MI300X-OAM?"),
        ("TPU-V4", "has no such accelerator"),
        ("no such thing", "It knows A100, A100-40G"),
    ],
)
def test_an_accelerator_that_ray_does_not_know(name, said, monkeypatch):
    """Before anything is deployed, with the nearest names."""
    with pytest.raises(EngineError) as error:
        deployed(monkeypatch, accelerator_type=name)

    assert said in str(error.value)
    assert f"accelerator_type '{name}': Ray" in str(error.value)


def test_all_accelerators_with_gpus_that_ray_knows(monkeypatch):
    """By Ray's own configuration, which takes no other."""
    from ray.llm._internal.serve.core.configs.accelerators import TPU_ACCELERATOR_VALUES, AcceleratorType

    names = {member.value for member in AcceleratorType if not member.name.startswith("__")}
    for name in names - TPU_ACCELERATOR_VALUES:
        deployed(monkeypatch, accelerator_type=name)
        assert llm_config(spec(accelerator_type=name)).accelerator_type == name


@pytest.mark.parametrize(
    ("fields", "nodes", "lacks"),
    [
        ({"gpus_per_worker": 0.1, "num_cpus": 0.5, "replicas": 20}, [GPU_NODE], None),
        ({"gpus_per_worker": 0.3333, "replicas": 6}, [GPU_NODE], None),
        ({"gpus_per_worker": 0.6, "replicas": 2}, [GPU_NODE], None),
        (
            {"gpus_per_worker": 0.6, "replicas": 3},
            [GPU_NODE],
            "3 CPU, 1.8 GPU in 3 parts of 1 CPU, 0.6 GPU, 1 of which fits on a",
        ),
        (
            {"gpus_per_worker": 0.4, "replicas": 5},
            [GPU_NODE],
            "5 CPU, 2 GPU in 5 parts of 1 CPU, 0.4 GPU, 2 of which fit on a GPU",
        ),
        ({}, [GPU_NODE], None),
        ({"tensor_parallel_size": 4}, [GPU_NODE, GPU_NODE], None),
        ({"gpus_per_worker": 0, "num_cpus": 8}, [CPU_NODE], None),
        ({"gpus_per_worker": 0.5, "replicas": 4}, [GPU_NODE], None),
        ({"replicas": (1, 9)}, [GPU_NODE], None),
        ({}, [CPU_NODE], "asks for 1 CPU, 1 GPU; the cluster has 8 CPU, 0 GPU in total"),
        (
            {"replicas": 3},
            [GPU_NODE],
            "asks for 3 CPU, 3 GPU in 3 parts of 1 CPU, 1 GPU; the cluster has 16 CPU, 2 GPU",
        ),
        ({"accelerator_type": "B200"}, [GPU_NODE], "asks for 1 CPU, 1 GPU, B200; the cluster has 16 CPU, 2 GPU, H100"),
        (
            {"gpus_per_worker": 0, "num_cpus": 12},
            [CPU_NODE, CPU_NODE],
            "the cluster has 16 CPU, 0 GPU in total, its nodes 8 CPU",
        ),
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


def test_a_lease_asks_for_its_deletion_until_it_is_gone(monkeypatch, capsys):
    """Whatever goes wrong with it; and a task that comes back in time keeps the engine."""
    asked = []

    def delete(application, _blocking):
        asked.append(application)
        if len(asked) < 3:
            raise RayServeException("the controller is away")

    monkeypatch.setattr(lease, "CHECK_PERIOD_S", 0.01)
    monkeypatch.setattr(lease.serve, "delete", delete)
    now = time.time()
    keeper = LeaseKeeper("raylm-e-1", LABELS, {"idle_timeout": 0.5, "max_lifetime": 3600}, now, now, None)
    until(lambda: len(asked) >= 5)
    keeper._watch.stop(5)
    asked.clear()
    asyncio.run(keeper.renew())
    keeper._delete_if_over()

    assert asked == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": no task")[0] for line in lines] == [
        "raylm: deleting raylm-e-1",
        "raylm: deleting the engine fails, and is tried every 0.01 s: RayServeException: the controller is away",
        "raylm: deleting the engine succeeds again",
    ]


def test_a_lease_that_was_restarted_does_not_count_the_time_before():
    """It knows of no renewal, and the tasks at work have not had the time for one."""
    now = time.time()
    keeper = LeaseKeeper("raylm-e-1", LABELS, {"idle_timeout": 60, "max_lifetime": 3600}, now - 1000, now - 900, None)
    keeper._watch.stop(5)

    assert keeper._renewed_at >= now


def test_an_engine_that_nobody_waits_for_any_more_is_deleted(monkeypatch):
    """Not one that was used or whose lease was restarted, which does not know, whoever says later that he waits."""
    asked = []
    monkeypatch.setattr(lease.serve, "delete", lambda *args, **kwargs: asked.append(args))
    now = time.time()

    def keeper(deployed_at):
        bounds = {"idle_timeout": 600, "max_lifetime": 3600}
        made = LeaseKeeper("raylm-e-1", LABELS, bounds, deployed_at, now + 600, None)
        made._watch.stop(5)
        return made

    def pass_by(one):
        """Let it be a minute later for what the lease knows of who waits."""
        if one._awaited_at is not None:
            one._awaited_at -= lease.AWAITED_S
        one._delete_if_over()

    waiting, used, restarted = keeper(now), keeper(now), keeper(now - lease.AWAITED_S)
    asyncio.run(used.renew())
    for one in (used, restarted):
        asyncio.run(one.awaited())
        pass_by(one)
    waiting._awaited_at -= lease.AWAITED_S
    asyncio.run(waiting.awaited())
    waiting._delete_if_over()
    assert asked == []
    pass_by(waiting)
    assert asked == [("raylm-e-1",)]


def test_an_engine_with_a_task_at_work_is_not_idle(monkeypatch):
    """However short its idle time is, beside the ten seconds after which a task renews."""
    asked = []
    monkeypatch.setattr(lease.serve, "delete", lambda *args, **kwargs: asked.append(args))
    now = time.time()
    keeper = LeaseKeeper("raylm-e-1", LABELS, {"idle_timeout": 0.1, "max_lifetime": 3600}, now, now, None)
    keeper._watch.stop(5)
    asyncio.run(keeper.renew("a"))
    time.sleep(0.2)
    keeper._delete_if_over()
    assert asked == []
    asyncio.run(keeper.release("a"))
    time.sleep(0.2)
    keeper._delete_if_over()
    assert asked == [("raylm-e-1",)]


def test_a_lease_says_who_works():
    """To whoever renews it; who was silent for half a minute does not count."""
    now = time.time()
    keeper = LeaseKeeper("raylm-e-1", LABELS, {"idle_timeout": 60, "max_lifetime": 3600}, now, now, None)
    try:
        assert asyncio.run(keeper.renew("a")) == ["a"]
        assert asyncio.run(keeper.renew("b")) == ["a", "b"]
        keeper._working["a", ""] -= lease.WORKING_S
        assert asyncio.run(keeper.renew()) == ["b"]
        asyncio.run(keeper.release("b"))
        assert asyncio.run(keeper.renew()) == []
        # One attempt waits until another has written.
        assert asyncio.run(keeper.renew("a", "first")) == asyncio.run(keeper.renew("a", "second")) == ["a"]
        asyncio.run(keeper.release("a", "first"))
        assert asyncio.run(keeper.renew()) == ["a"]
    finally:
        keeper._watch.stop(5)


@pytest.fixture
def serve(monkeypatch):
    """A Serve in memory: what its status is, and what the leases of its applications answer; an exception is raised."""
    serve = SimpleNamespace(applications={}, answers={}, user_configs={}, deleted=[], asked=0)

    class Lease:
        def __init__(self, application):
            self.application = application

        def __getattr__(self, method):
            return SimpleNamespace(remote=lambda *arguments: self)

        def cancel(self):
            pass

        def result(self, timeout_s):
            serve.asked += 1
            answer = serve.answers[self.application]
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

    def details():
        return {
            "applications": {
                name: {"deployments": {"lease-f": {"deployment_config": {"user_config": config}}}}
                for name, config in serve.user_configs.items()
            }
        }

    def delete(application, _blocking):
        serve.deleted.append(application)
        del serve.applications[application]

    monkeypatch.setattr(leases, "_leases", {})
    monkeypatch.setattr(applications, "every", lambda: dict(serve.applications))
    monkeypatch.setattr(applications, "is_free", lambda application: True)
    monkeypatch.setattr(leases, "_get_global_client", lambda: SimpleNamespace(get_serve_details=details))
    monkeypatch.setattr(leases.serve, "get_deployment_handle", lambda deployment, application: Lease(application))
    monkeypatch.setattr(leases.serve, "delete", delete)
    monkeypatch.setattr(applications, "POLL_PERIOD_S", 0.01)
    return serve


def add(serve, name, answer, state="RUNNING", user_config=None, deployment="lease-f"):
    status = SimpleNamespace(status=ApplicationStatus(state), deployments={"engine": 0, deployment: 0}, message="")
    serve.applications[name], serve.answers[name] = status, answer
    serve.user_configs[name] = user_config


def about(age=5.0, working=(), **labels):
    return {"labels": {**LABELS, **labels}, "age_seconds": age, "working": list(working), "usage": {}, "spent": {}}


SILENCE = TimeoutError()


def test_a_lease_that_does_not_answer_is_not_nobody_works(serve):
    """A teardown that may not delete under a task does not, and says why; who says so deletes."""
    add(serve, "a", SILENCE)
    said = []
    with pytest.raises(EngineError, match=r"the lease of a does not answer: .* Run the teardown again when it does"):
        retire.teardown("a", said.append, on_busy="fail")
    assert serve.deleted == []
    retire.teardown("a", said.append, on_busy="wait", drain_timeout=0.05)
    assert said == [
        "the lease of a does not answer: it is not known who works on it: waiting until it does, at most 0.05 s "
        "(drain_timeout)",
        "the lease of a does not answer: it is not known who works on it after 0.05 s (drain_timeout): deleting it",
        "engine a is deleted",
    ]
    add(serve, "b", SILENCE)
    report = retire.teardown("b", said.append, on_busy="delete")
    assert (report.existed, report.engine_seconds, serve.deleted) == (True, 0.0, ["a", "b"])


def test_a_teardown_waits_for_an_answer_and_then_for_the_task(serve):
    """As long as it may."""
    add(serve, "a", [SILENCE, SILENCE, about(working=["out"]), about()])
    said = []
    retire.teardown("a", said.append, on_busy="wait", drain_timeout=60)

    assert [line.partition(": waiting")[0] for line in said] == [
        "the lease of a does not answer: it is not known who works on it",
        "a is at work on out",
        "engine a is deleted",
    ]


@pytest.mark.parametrize(
    ("state", "deployment"), [("DEPLOY_FAILED", "lease-f"), ("DELETING", "lease-f"), ("RUNNING", "other")]
)
def test_nobody_works_on_what_takes_no_work(serve, state, deployment):
    """Its silent lease keeps no teardown waiting."""
    add(serve, "a", SILENCE, state=state, deployment=deployment)

    assert leases.working("a") == leases.working("not there") == ()
    assert retire.teardown("a", print, on_busy="fail").existed


def test_a_renewal_says_whether_it_got_through(serve):
    """What is not there has nothing to renew; a lease that answered is asked again without Serve's controller."""
    add(serve, "a", [["out"], ["out"], SILENCE, ["out"]])
    assert leases.renew("a", "out") == ("out",)
    there = serve.applications.pop("a")
    assert leases.renew("a", "out") == ("out",)
    with pytest.raises(leases.SilentLease, match="the lease of a does not answer: no answer within 20 s"):
        leases.renew("a", "out")
    assert leases.renew("a", "out") == ()
    serve.applications["a"] = there
    assert leases.renew("a", "out") == ("out",)
    # The end of a task is not lost with its lease's answer.
    serve.answers["a"] = SILENCE
    leases.release("a", "out")


def test_a_sweep_of_engines_whose_lease_is_silent(serve):
    """They are known by what Serve keeps, deleted by name and never by age; what is not known to be ours is left."""
    config = REF.model_dump(mode="json")
    elsewhere = {**config, "labels": {**LABELS, "installation": "elsewhere"}}
    add(serve, "raylm-old", about(age=100))
    add(serve, "raylm-silent", SILENCE, user_config=config)
    add(serve, "raylm-theirs", SILENCE, user_config=elsewhere)
    add(serve, "raylm-unknown", SILENCE, user_config={"of": "another version"})
    add(serve, "raylm-none", SILENCE)
    add(serve, "raylm-stranger", SILENCE, deployment="other", user_config=config)
    said = []
    report = retire.sweep((), 0.5, "i", said.append)
    assert [one.application for one in report.engines] == ["raylm-old", "raylm-silent"]
    assert (report.engines[1].age_seconds, report.engines[1].working) == (None, None)
    assert report.deleted == ("raylm-old",)
    assert [line.partition(" does not")[0] for line in said if "does not answer" in line] == [
        "the lease of raylm-none",
        "the lease of raylm-silent",
        "the lease of raylm-unknown",
    ]

    add(serve, "raylm-going", SILENCE, state="DELETING", user_config=config)
    assert "raylm-going" not in [one.application for one in retire.sweep((), None, "i", said.append).engines]
    assert retire.sweep(("raylm-going",), None, "i", said.append).deleted == ("raylm-going",)

    everything = tuple(serve.applications)
    assert retire.sweep(everything, None, "i", said.append).deleted == ("raylm-silent",)
