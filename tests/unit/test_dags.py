"""The DAGs that users copy parse and run, on a cluster that is not there."""

import pytest
from airflow.utils.session import create_session

from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.operators.base import RayLMOperator
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator, DeployEngineOperator, installation
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.specs.engine import COMMAND_RUN
from airflow_provider_raylm.testing import FakeRayJobs
from tests.airflows import AIRFLOW, clear_task_instances
from tests.conftest import DAGS


def run(dagbag, dag_id, fake):
    with fake.installed():
        return dagbag.dags[dag_id].test()


def states(dag_run):
    return {ti.task_id: str(ti.state) for ti in dag_run.get_task_instances()}


def test_every_dag_parses(dagbag):
    """And every file holds one."""
    assert dagbag.import_errors == {}
    assert len(dagbag.dags) == len(list(DAGS.glob("*.py")))


@pytest.mark.parametrize(
    ("dag_id", "engines", "tasks"),
    [
        ("raylm_quickstart", ["reviewer"], {"label", "keywords", "reply"}),
        ("raylm_daily_reviews", ["reviewer"], {"review"}),
        ("raylm_two_engines", ["sorter", "writer"], {"topic", "draft"}),
        ("raylm_partitions", ["reader"], {"language"}),
        ("raylm_partition_groups", ["reader"], {"partition.language", "partition.summary"}),
        ("raylm_taskflow", ["reader"], {"summary", "language"}),
        ("raylm_typed_extraction", ["reader"], {"facts", "urgency"}),
        ("raylm_conversations", ["assistant"], {"reply"}),
        ("raylm_embeddings", ["encoder", "classifier"], {"vectors", "classes"}),
        ("raylm_adapters", ["writer"], {"checked", "reply"}),
        ("raylm_sweep_engines", [], set()),
    ],
)
def test_every_dag_runs(dagbag, dag_id, engines, tasks):
    """One start per engine, every task on it, nothing left."""
    fake = FakeRayJobs()

    assert run(dagbag, dag_id, fake).state == "success"

    assert engines == fake.deployed
    assert tasks == set(fake.batches)
    assert fake.engines == {}


def test_a_dag_runs_without_workers_that_wait(dagbag, monkeypatch):
    """Deferred and resumed, it ends as it does otherwise; an error comes back as what it was."""
    fake = FakeRayJobs()
    fake.fail("keywords", EngineError("the engine has failed"))
    for task in dagbag.dags["raylm_quickstart"].tasks:
        if hasattr(task, "deferrable"):
            monkeypatch.setattr(task, "deferrable", True)
    dag_run = run(dagbag, "raylm_quickstart", fake)

    assert states(dag_run) == {
        "deploy_reviewer": "success",
        "label": "success",
        "keywords": "failed",
        "reply": "success",
        "teardown_reviewer": "success",
    }
    assert fake.engines == {}


@pytest.mark.parametrize("over", [True, False])
def test_airflow_tells_a_cleared_task_from_a_retried_one(dagbag, over):
    """By a number that the job bears; 3.1 only where the run was over."""
    fake = FakeRayJobs()
    dag_run = run(dagbag, "raylm_quickstart", fake)
    assert {request.metadata["clear_number"] for request in fake.submitted} == {"0"}

    with create_session() as session:
        dag_run = session.merge(dag_run)
        dag_run.state = "success" if over else "running"
        label = [ti for ti in dag_run.get_task_instances(session=session) if ti.task_id == "label"]
        clear_task_instances(label, session)
        assert dag_run.clear_number == (1 if over or AIRFLOW >= (3, 2) else 0)


def test_data_is_prepared_before_an_engine_is_paid_for(dagbag):
    """Whatever has to be there for an inference task is there before its engine is deployed."""
    prepared = set()
    for dag in dagbag.dags.values():
        for deploy in (task for task in dag.tasks if isinstance(task, DeployEngineOperator)):
            users = [task for task in deploy.get_flat_relatives(upstream=False) if is_ours(task)]
            needed = {one for task in users for one in task.get_flat_relatives(upstream=True) if not is_ours(one)}
            # What works on answers is no preparation.
            needed = {
                one.task_id for one in needed if not any(map(is_inference, one.get_flat_relatives(upstream=True)))
            }
            before = {one.task_id for one in deploy.get_flat_relatives(upstream=True)}
            assert needed <= before, dag.dag_id
            prepared |= {dag.dag_id} if needed else set()

    assert {"raylm_partitions", "raylm_partition_groups"} <= prepared


def class_of(task):
    return getattr(task, "operator_class", type(task))


def is_ours(task):
    return issubclass(class_of(task), RayLMOperator)


def is_inference(task):
    return issubclass(class_of(task), BatchInferenceOperator)


def test_links_lead_to_job_engine_and_output(dagbag):
    """They are stored when the task has its job, and still there at its end."""
    fake = FakeRayJobs()
    dag_run = run(dagbag, "raylm_quickstart", fake)
    (label,) = (ti for ti in dag_run.get_task_instances() if ti.task_id == "label")
    operator = dagbag.dags["raylm_quickstart"].task_dict["label"]
    links = {link.name: label.xcom_pull("label", key=link.xcom_key) for link in operator.operator_extra_links}
    job = next(request.submission_id for request in fake.submitted if request.metadata["task_id"] == "label")

    assert links["Ray job"] == f"http://fake-ray:8265/#/jobs/{job}"
    assert links["Serve application"].startswith("http://fake-ray:8265/#/serve/applications/raylm-reviewer-")
    assert links["Output"] == "s3://out/quickstart/label"


def test_templates_are_rendered(dagbag):
    """Params reach the specs, and one task's output is the next one's source."""
    fake = FakeRayJobs()
    run(dagbag, "raylm_quickstart", fake)

    assert fake.batches["label"].output == "s3://out/quickstart/label"
    assert fake.batches["reply"].sources == ("s3://out/quickstart/label",)
    assert fake.batches["reply"].output_column == "reply"
    verbs = [request.verb for request in fake.submitted]
    assert (verbs[0], verbs[-1], len(verbs)) == ("deploy", "teardown", 5)


def test_the_engine_is_torn_down_when_a_task_fails(dagbag):
    """The run fails, the engine goes."""
    fake = FakeRayJobs()
    fake.fail("label", EngineError("no luck"))
    result = run(dagbag, "raylm_quickstart", fake)

    assert result.state == "failed"
    assert fake.engines == {}
    assert states(result) == {
        "deploy_reviewer": "success",
        "label": "failed",
        "keywords": "success",
        "reply": "upstream_failed",
        "teardown_reviewer": "success",
    }


class LosesItsEngine(FakeRayJobs):
    """Before the task `review`."""

    def submit(self, request):
        if request.metadata["task_id"] == "review":
            self._engines.clear()
        return super().submit(request)


def test_an_engine_that_is_gone_comes_back_where_the_author_says_so(dagbag, monkeypatch):
    """As the deploy task made it, from the spec of the deploy task and from no other; and it is torn down."""
    fake = LosesItsEngine()
    result = run(dagbag, "raylm_daily_reviews", fake)

    assert states(result)["review"] == "success"
    assert fake.deployed == ["reviewer", "reviewer"]
    deploy, infer = (next(r for r in fake.submitted if r.verb == verb) for verb in ("deploy", "infer"))
    assert infer.payload["redeploy"] == deploy.payload["engine"]
    assert fake.engines == {}

    review = dagbag.dags["raylm_daily_reviews"].task_dict["review"]
    monkeypatch.setattr(review, "retries", 0)
    for redeploy in ({"name": "reviewer", "model": "another"}, None):
        monkeypatch.setattr(review, "redeploy", redeploy)
        fake = LosesItsEngine()
        assert states(run(dagbag, "raylm_daily_reviews", fake))["review"] == "failed"
        assert fake.deployed == ["reviewer"]


def test_each_partition_gets_its_task(dagbag):
    """On the one engine."""
    fake = FakeRayJobs()
    run(dagbag, "raylm_partitions", fake)

    outputs = {request.payload["batch"]["output"] for request in fake.submitted if request.verb == "infer"}
    assert outputs == {f"s3://out/reviews/region={region}" for region in ("eu", "us", "apac")}


def test_each_partition_gets_its_group_of_tasks(dagbag):
    """The second task of a group reads what the first of the same group wrote; all of them on the one engine."""
    fake = FakeRayJobs()
    run(dagbag, "raylm_partition_groups", fake)

    batches = [request.payload["batch"] for request in fake.submitted if request.verb == "infer"]
    assert {(batch["source"], batch["output"]) for batch in batches} == {
        place
        for region in ("eu", "us", "apac")
        for place in (
            (f"s3://in/reviews/region={region}", f"s3://out/reviews/languages/region={region}"),
            (f"s3://out/reviews/languages/region={region}", f"s3://out/reviews/summaries/region={region}"),
        )
    }
    assert {batch["output_column"] for batch in batches} == {"language", "summary"}


def test_a_sweep_deletes_what_outlived_its_run(dagbag):
    """An engine whose run is deleted goes; another installation's is not even seen, a command's is left to it."""
    fake = FakeRayJobs()
    with fake.installed():
        here = installation()
    for whose, run_id in ((here, "gone"), ("elsewhere", "gone"), (here, f"{COMMAND_RUN}0a1b2c")):
        labels = {"installation": whose, "dag_id": "gone", "run_id": run_id, "engine": "e"}
        payload = {"engine": {"name": "e", "model": "m"}, "labels": labels, "replace": False}
        assert fake.submit(JobRequest(f"{whose} {run_id}", "deploy", payload))
    ours, *others = fake.engines

    assert run(dagbag, "raylm_sweep_engines", fake).state == "success"
    assert list(fake.engines) == others
    assert fake.submitted[-1].payload["delete"] == [ours]


def test_an_engine_is_torn_down_after_all_that_use_it(dagbag):
    """Mapped tasks too, which Airflow's own setup and teardown context leaves out."""
    for dag_id, last in [
        ("raylm_partitions", "language"),
        ("raylm_partition_groups", "partition.summary"),
        ("raylm_quickstart", "reply"),
        ("raylm_two_engines", "draft"),
    ]:
        dag = dagbag.dags[dag_id]
        assert any(task.startswith("teardown_") for task in dag.get_task(last).downstream_task_ids), dag_id
    assert "teardown_sorter" in dagbag.dags["raylm_two_engines"].get_task("topic").downstream_task_ids


def test_a_function_can_make_the_spec(dagbag, monkeypatch):
    """When the task runs, from the context and from what earlier tasks return; and nothing else than a spec."""
    fake = FakeRayJobs()
    run(dagbag, "raylm_taskflow", fake)

    assert fake.batches["summary"].sources == ("s3://in/articles/*.parquet",)
    assert fake.batches["summary"].prompt == "Sum up in one sentence: ${text}"
    assert fake.batches["language"].sources == ("s3://out/taskflow/summary",)
    assert (fake.batches["language"].output, fake.batches["language"].max_tokens) == ("s3://out/taskflow/language", 4)

    monkeypatch.setattr(dagbag.dags["raylm_taskflow"].task_dict["summary"], "python_callable", lambda: None)
    assert states(run(dagbag, "raylm_taskflow", fake))["summary"] == "failed"
    assert fake.engines == {}


HOSTILE = "{{ conn.raylm_secret.password }}"


@pytest.mark.parametrize("render_returned", [False, True])
def test_what_a_runs_conf_holds_is_no_template(dagbag, monkeypatch, render_returned):
    """Neither where Airflow has put it, nor in what a function returns, unless its author says so."""
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_SECRET", "http://:hidden@h")
    dag = dagbag.dags["raylm_taskflow"]
    summary = dag.task_dict["summary"]
    monkeypatch.setattr(summary, "batch", {**summary.batch, "prompt": "${text} {{ params.source }}"})
    monkeypatch.setattr(summary, "render_returned", render_returned)
    fake = FakeRayJobs()
    with fake.installed():
        assert dag.test(run_conf={"source": HOSTILE}).state == "success"

    assert fake.batches["summary"].prompt == f"${{text}} {HOSTILE}"
    assert fake.batches["summary"].sources == (f"{'hidden' if render_returned else HOSTILE}/*.parquet",)
