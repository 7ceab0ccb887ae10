"""What the dashboard lists, as Ray's own classes write it, and what the page makes of it over hours."""

import json

import pytest

from airflow_provider_raylm.inventory import SeenEngine, SeenJob, engines_in, jobs_in, reference
from airflow_provider_raylm.plugins.views import gpu_seconds, is_stopping, lease_left, rates
from airflow_provider_raylm.plugins.watching import Look
from airflow_provider_raylm.polling import JobInfo, Unreachable
from airflow_provider_raylm.ray_jobs import RayJobsClient
from airflow_provider_raylm.specs import EngineSpec, Labels, Lease, Progress
from tests.unit.test_ray_jobs import dashboard

LABELS = Labels(installation="i", dag_id="d", run_id="r", engine="e")
SPEC = EngineSpec(
    name="e", model="m", tensor_parallel_size=2, replicas=3, lease=Lease(idle_timeout=600, max_lifetime=3600)
)
REF = reference(SPEC, LABELS, 1000.0)


def applications(status="RUNNING", about=None, replicas=("RUNNING", "STARTING"), autoscaling=None):
    """Return an engine of this package and somebody's application, as Serve's REST API describes them."""
    schema = pytest.importorskip("ray.serve.schema")

    def details(name, deployment, user_config=None, states=(), **config):
        return schema.DeploymentDetails(
            name=name,
            status="UPDATING",
            status_trigger="CONFIG_UPDATE_STARTED",
            message=f"of the {name}",
            deployment_config=schema.DeploymentSchema(name=name, user_config=user_config, **config),
            target_num_replicas=3,
            required_resources={},
            replicas=[
                schema.ReplicaDetails(
                    node_id="n",
                    node_ip="10.0.0.1",
                    node_instance_id="i",
                    actor_id=f"a{at}",
                    actor_name=f"r{at}",
                    worker_id="w",
                    log_file_path="",
                    replica_id=f"{deployment}#{at}",
                    state=state,
                    pid=1,
                    start_time_s=1010.0 + at,
                )
                for at, state in enumerate(states)
            ],
        )

    engine = {"num_replicas": 3} if autoscaling is None else {"autoscaling_config": autoscaling}
    deployments = {
        "engine": details("engine", "engine", None, replicas, **engine),
        f"lease-{REF.fingerprint}": details("lease", "lease", REF.model_dump(mode="json") if about is None else about),
    }

    def application(name, deployments):
        return schema.ApplicationDetails(
            name=name,
            route_prefix=None,
            docs_path=None,
            status=status,
            message="of the application",
            last_deployed_time_s=1000.0,
            deployed_app_config=None,
            source="imperative",
            external_scaler_enabled=False,
            deployments=deployments,
        )

    both = {REF.application: application(REF.application, deployments), "other": application("other", {})}
    # As Serve's controller does: without what nobody has set.
    return {name: json.loads(one.model_dump_json(exclude_unset=True)) for name, one in both.items()}


@pytest.mark.parametrize("status", ["RUNNING", "DEPLOYING", "UNHEALTHY", "DELETING", "DEPLOY_FAILED"])
def test_an_engine_is_seen_in_any_state(status):
    """With what its reference says, and how many replicas live; nobody else's application is."""
    (engine,) = engines_in(applications(status), "http://ray:8265")
    assert engine.ref == REF.model_copy(update={"dashboard_url": "http://ray:8265"})
    assert (engine.status, engine.message, engine.autoscales) == (status, "of the engine", False)
    assert (engine.wanted, engine.running, engine.started_at) == (3, 1, (1010.0, 1011.0))


def test_an_engine_that_autoscales():
    """By its configuration."""
    (engine,) = engines_in(applications(autoscaling={"min_replicas": 1, "max_replicas": 3}), "http://ray:8265")
    assert engine.autoscales


def test_an_engine_of_another_version_is_seen_as_foreign():
    """It says what this one does not understand, and holds GPUs all the same; one that says nothing is left out."""
    (engine,) = engines_in(applications(about={**REF.model_dump(mode="json"), "new": 1}), "http://ray:8265")
    assert engine.foreign
    assert engine.ref.labels == REF.labels
    assert engines_in(applications(about={"new": 1}), "http://ray:8265") == ()


def test_jobs_are_those_of_this_package():
    """As the Jobs API lists them; those that a driver began by itself have no id."""
    models = pytest.importorskip("ray.dashboard.modules.job.pydantic_models")
    common = {"type": "SUBMISSION", "entrypoint": "python"}
    metadata = {"application": REF.application, "dag_id": "d"}
    done = {"start_time": 2_000_000, "end_time": 3_000_500, "driver_node_id": "n"}
    listed = [
        models.JobDetails(**common, submission_id="raylm-infer-x-0-1", status="SUCCEEDED", metadata=metadata, **done),
        models.JobDetails(**common, submission_id="raylm-teardown-x-0-1", status="PENDING", message="No room."),
        models.JobDetails(**common, submission_id="raysubmit_1", status="RUNNING"),
        models.JobDetails(type="DRIVER", job_id="01000000", entrypoint="", status="RUNNING"),
    ]
    infer, teardown = jobs_in([json.loads(one.model_dump_json()) for one in listed])

    assert (infer.verb, infer.application, infer.ended_at) == ("infer", REF.application, 3000.5)
    assert infer.info == JobInfo("SUCCEEDED", "", metadata, 2000.0, True)
    assert (teardown.verb, teardown.application, teardown.ended_at) == ("teardown", None, None)
    assert (teardown.info.status, teardown.info.message) == ("PENDING", "No room.")


def test_who_is_no_dashboard_has_listed_nothing():
    """Such as a page to log in: it is silence, and not a cluster without jobs."""
    odd = '[{"submission_id": "raylm-infer-x-0-1", "status": "ok"}]'
    for body in ("<html>", "{}", '["a"]', odd, odd.replace("ok", 'RUNNING", "start_time": "x')):
        with dashboard(body=body) as (url, _), pytest.raises(Unreachable, match="not as a Ray dashboard"):
            RayJobsClient(url).all_jobs()
    for found in ("null", "[]", "[1]", '{"raylm-e": {}}', '{"raylm-e": {"deployments": [1]}}'):
        with dashboard(body=f'{{"applications": {found}}}') as (url, _):
            with pytest.raises(Unreachable, match="not as a Ray dashboard"):
                RayJobsClient(url).all_engines()


def seen(status="RUNNING", autoscales=False, **ref):
    return SeenEngine(REF.model_copy(update=ref), status, "", 3, (1500.0, 1900.0), 2, autoscales)


def job(verb="infer", status="SUCCEEDED", ended_at=None):
    return SeenJob(f"raylm-{verb}-x", JobInfo(status, "", {"application": REF.application}), ended_at)


@pytest.mark.parametrize(
    ("engine", "jobs", "left"),
    [
        (seen(), [], (100.0, "idle_timeout")),
        (seen(), [job("deploy", ended_at=1200.0)], (300.0, "idle_timeout")),
        (seen(), [job("deploy", ended_at=1200.0), job(ended_at=1400.0)], (500.0, "idle_timeout")),
        (seen(), [job(status="RUNNING")], (600.0, "idle_timeout")),
        (seen(), [job("teardown", ended_at=1490.0)], (100.0, "idle_timeout")),
        (seen(lease=Lease(idle_timeout=600, max_lifetime=700)), [job(status="RUNNING")], (200.0, "max_lifetime")),
        (seen("DEPLOYING"), [job("deploy", status="RUNNING")], (3100.0, "max_lifetime")),
        (seen(deployed_at=0.0), [], (None, None)),
        (seen(deployed_at=1.0), [], (0.0, "idle_timeout")),
    ],
)
def test_the_lease_that_is_left(engine, jobs, left):
    """Whole while a task works, less since the last of its jobs ended, and never beyond its greatest age."""
    assert lease_left(engine, jobs, 1500.0) == left


def test_gpu_time_so_far():
    """Of a fixed size from the deployment on; of one that autoscales the replicas that live: a lower bound."""
    assert gpu_seconds(seen(), 2000.0) == (3 * 2 * 1000.0, False)
    assert gpu_seconds(seen(autoscales=True), 2000.0) == (2 * (500.0 + 100.0), True)
    assert gpu_seconds(seen(gpus_per_replica=0.0), 2000.0) == (0.0, False)
    assert gpu_seconds(seen(deployed_at=0.0), 2000.0) == (None, False)


def test_an_engine_is_being_stopped_while_its_teardown_is_at_work():
    """Whoever asked for it; one that failed has stopped nothing."""
    assert is_stopping(seen(), [job("teardown", "RUNNING")])
    assert is_stopping(seen(), [job("teardown", "PENDING")])
    assert is_stopping(seen("DELETING"), [])
    assert not is_stopping(seen(), [job("teardown", "FAILED"), job(status="RUNNING")])


def test_rates_are_of_the_last_minute():
    """A task that stands still has none, whatever it did before; one record tells the whole attempt's."""
    records = [
        Progress(at=at, seconds=at, rows=min(at, 100), completion_tokens=min(at, 100)) for at in range(10, 310, 10)
    ]
    assert rates(records) == (0.0, 0.0)
    assert rates(records[:9]) == (1.0, 1.0)
    assert rates([Progress(at=20, seconds=10, rows=30, completion_tokens=60)]) == (3.0, 6.0)
    assert Look().state == "looking"
