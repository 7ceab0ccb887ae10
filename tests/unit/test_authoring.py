"""A dozen lines of DAG: which tasks there are, in which order, and what cannot be written."""

import os
from datetime import timedelta

import pytest
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.sdk import DAG, literal, setup, task, task_group, teardown

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.errors import EngineError, EngineGone, SpecError
from airflow_provider_raylm.operators.raylm import (
    BatchInferenceOperator,
    DeployEngineOperator,
    SweepEnginesOperator,
    TeardownEngineOperator,
    installation,
)
from airflow_provider_raylm.specs import BatchSpec
from airflow_provider_raylm.testing import FakeRayJobs
from tests.airflows import DagBag, sync_bag_to_db

BATCH = {"source": "s3://in", "prompt": "${text}", "output": "s3://out/a"}
MAPPED = {**BATCH, "output": "s3://out/b"}


def infer(engine, task_id):
    return engine.infer(task_id, source="s3://in", prompt="${text}", output=f"s3://out/{task_id}")


def before(dag, task_id):
    """Return the ids of all tasks that have to be over before that one."""
    return {one.task_id for one in dag.task_dict[task_id].get_flat_relatives(upstream=True)}


def run(dag, fake):
    # As the DAG processor does with what it finds in a file.
    DagBundlesManager().sync_bundles_to_db()
    bag = DagBag(os.devnull)
    bag.dags[dag.dag_id] = dag
    sync_bag_to_db(bag, "dags-folder", None)
    with fake.installed():
        return {ti.task_id: str(ti.state) for ti in dag.test().get_task_instances()}


def test_two_engines_at_a_time(airflow_db):
    """Each is up before its tasks, and goes after them."""
    with DAG("two", schedule=None) as dag:
        with shared_engine("a", model="m") as a, shared_engine("b", model="m") as b:
            infer(a, "on_a")
            infer(b, "on_b")
    fake = FakeRayJobs()

    dag.check_cycle()
    assert {"deploy_a", "on_a"} <= before(dag, "teardown_a")
    assert {"deploy_b", "on_b"} <= before(dag, "teardown_b")
    assert set(run(dag, fake).values()) == {"success"}
    assert (fake.deployed, fake.engines) == (["a", "b"], {})


def test_an_engine_within_an_engine():
    """And a task before and after it."""
    with DAG("nested", schedule=None) as dag, shared_engine("a", model="m") as a:
        infer(a, "first")
        with shared_engine("b", model="m") as b:
            infer(b, "second")
        infer(a, "third")

    dag.check_cycle()
    assert before(dag, "teardown_a") >= {"first", "second", "third", "teardown_b"}
    assert before(dag, "teardown_b") >= {"second"}
    assert "deploy_b" not in before(dag, "third")


def test_an_engine_within_somebody_elses_setup():
    with DAG("setup", schedule=None) as dag:

        @setup
        def make():
            pass

        @teardown
        def unmake():
            pass

        made, unmade = make(), unmake()
        with unmade.as_teardown(setups=made), shared_engine("a", model="m") as a:
            infer(a, "on_a")

    dag.check_cycle()
    assert "make" in before(dag, "deploy_a")
    assert {"on_a", "teardown_a"} <= before(dag, "unmake")


def test_mapped_tasks_are_inside_too():
    """Also those that do not name the engine: Airflow's own context leaves them out."""
    with DAG("mapped", schedule=None) as dag:

        @task
        def numbers():
            return [1, 2]

        @task
        def use(n):
            return n

        some = numbers()
        with shared_engine("a", model="m"):
            use.expand(n=some)

            @task_group
            def group(n):
                use(n)

            group.expand(n=some)

    for task_id in ("use", "group.use"):
        assert "deploy_a" in before(dag, task_id)
        assert task_id in before(dag, "teardown_a")
    assert "numbers" not in before(dag, "deploy_a")


def test_equal_names_in_two_groups_are_refused():
    """They would be one engine."""
    with DAG("groups", schedule=None):

        @task_group
        def one():
            with shared_engine("a", model="m") as engine:
                infer(engine, "x")

        @task_group
        def other():
            with shared_engine("a", model="m") as engine:
                infer(engine, "x")

        one()
        with pytest.raises(SpecError, match=r"other.deploy_a: one.deploy_a deploys an engine named 'a' already"):
            other()


@pytest.mark.parametrize("name", ["a", "{{ params.name }}"])
def test_equal_names_of_engines_made_by_hand_are_refused(name):
    """One template is one name."""
    with DAG("hands", schedule=None, params={"name": "a"}):
        engine = {"name": name, "model": "m"}
        DeployEngineOperator(task_id="one", engine=engine)
        DeployEngineOperator(task_id="third", engine={**engine, "name": "b"})
        with pytest.raises(SpecError, match=r"other: one deploys an engine named .* already"):
            DeployEngineOperator(task_id="other", engine=engine)
        if name == "a":
            with pytest.raises(SpecError, match=r"deploy_b: third deploys"), shared_engine("b", model="m"):
                pass


def test_each_instance_of_a_mapped_group_has_its_engine(airflow_db):
    """And takes only that one down."""
    with DAG("each", schedule=None) as dag:

        @task_group
        def group(source):
            with shared_engine("a", model="m") as engine:
                engine.infer("x", source=source, prompt="${text}", output="s3://out/{{ ti.map_index }}")

        group.expand(source=["s3://in/1", "s3://in/2"])
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert fake.deployed == ["a", "a"]
    assert len({request.payload["application"] for request in fake.submitted if request.verb == "teardown"}) == 2
    assert fake.engines == {}


def test_all_tasks_of_an_engine_have_its_connection():
    """Given to the engine or to the DAG; those made by hand, mapped and decorated ones too."""
    with DAG("c", schedule=None, default_args={"raylm_conn_id": "of_the_dag"}) as dag:
        with shared_engine("a", model="m") as a:
            infer(a, "x")
        with shared_engine("b", model="m", raylm_conn_id="other") as b:
            infer(b, "y")
            BatchInferenceOperator(task_id="hand", engine=b.ref, batch=BATCH)
            BatchInferenceOperator.partial(task_id="mapped", engine=b.ref).expand(batch=[MAPPED])

            @task.raylm(engine=b.ref, batch={"prompt": "${text}"})
            def decorated():
                return {}

            decorated()
            infer(b, "own").raylm_conn_id = "own"

    found = {one.task_id: getattr(one, "raylm_conn_id", None) for one in dag.tasks}
    assert [found[name] for name in ("deploy_a", "x", "teardown_a")] == ["of_the_dag"] * 3
    assert [found[name] for name in ("deploy_b", "y", "hand", "decorated", "teardown_b")] == ["other"] * 5
    mapped = dag.task_dict["mapped"]
    assert mapped.unmap({"batch": MAPPED}).raylm_conn_id == "other"


def test_the_generated_tasks_take_arguments():
    """Beside those of the DAG; a teardown is tried again unless somebody says otherwise."""
    with DAG("args", schedule=None) as dag:
        with shared_engine("a", model="m", deploy_args={"retries": 5}, teardown_args={"on_busy": "delete"}) as engine:
            infer(engine, "x")
    with DAG("args_of_the_dag", schedule=None, default_args={"retries": 7}) as of_the_dag:
        with shared_engine("a", model="m", teardown_args={"pool": "p"}) as engine_of_the_dag:
            infer(engine_of_the_dag, "x")

    assert (dag.task_dict["deploy_a"].retries, engine.teardown.retries, engine.teardown.on_busy) == (5, 2, "delete")
    assert (of_the_dag.task_dict["teardown_a"].retries, engine_of_the_dag.teardown.pool) == (7, "p")


@pytest.mark.parametrize("name", ["misspelt", "not a name", "raylm/x"])
def test_a_teardown_of_what_nobody_deploys_is_no_success(airflow_db, name):
    """It would leave the engine; a name that cannot be one is refused when the DAG is parsed."""
    with DAG("misspelt", schedule=None) as dag:
        deploy = DeployEngineOperator(task_id="deploy", engine={"name": "spelt", "model": "m"})
        if name != "misspelt":
            with pytest.raises(SpecError, match=r"EngineSpec\.name"):
                TeardownEngineOperator(task_id="teardown", engine=name)
            return
        deploy >> TeardownEngineOperator(task_id="teardown", engine=name, retries=0)
    fake = FakeRayJobs()

    assert run(dag, fake)["teardown"] == "failed"
    assert [spec.name for spec in fake.engines.values()] == ["spelt"]


def test_a_teardown_by_name_goes_by_what_the_deploy_has_said(airflow_db, monkeypatch):
    """Also when this Airflow is called otherwise by now."""
    with DAG("renamed", schedule=None) as dag, shared_engine("a", model="m"):

        @task
        def rename():
            monkeypatch.setenv("AIRFLOW__RAYLM__INSTALLATION", "renamed")

        rename()
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert fake.engines == {}


def test_a_teardown_by_a_templated_name_goes_by_what_the_deploy_has_said(airflow_db, monkeypatch):
    """Also when the template says something else by now; and this Airflow is called otherwise."""
    monkeypatch.setenv("NAME_OF_ENGINE", "first")
    named = "{{ named() }}"
    with DAG("templated", schedule=None, user_defined_macros={"named": lambda: os.environ["NAME_OF_ENGINE"]}) as dag:
        deploy = DeployEngineOperator(task_id="deploy", engine={"name": named, "model": "m"})

        @task
        def rename():
            monkeypatch.setenv("NAME_OF_ENGINE", "second")
            monkeypatch.setenv("AIRFLOW__RAYLM__INSTALLATION", "renamed")

        deploy >> rename() >> TeardownEngineOperator(task_id="teardown", engine=named)
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert fake.engines == {}


@pytest.mark.parametrize(
    ("name", "deployed_as", "own", "found"),
    [
        ("a", "a", {}, "other"),
        ("{{ params.n }}", "{{ params.n }}", {}, "other"),
        ("a", "{{ params.n }}", {}, "other"),
        ("a", "a", {"raylm_conn_id": "own"}, "own"),
    ],
)
def test_a_teardown_by_name_goes_where_the_deploy_went(airflow_db, monkeypatch, name, deployed_as, own, found):
    """Unless it is told to go elsewhere."""
    asked = []
    with DAG("conns", schedule=None, params={"n": "a"}) as dag:
        for conn_id in ("another", "other"):
            engine = {"name": deployed_as if conn_id == "other" else "b", "model": "m"}
            deploy = DeployEngineOperator(task_id=conn_id, engine=engine, raylm_conn_id=conn_id)
            mine = {"engine": name, **own} if conn_id == "other" else {"engine": "b"}
            TeardownEngineOperator(task_id=f"end_{conn_id}", **mine).as_teardown(setups=deploy)
    fake = FakeRayJobs()
    run_on_cluster = TeardownEngineOperator.run_on_cluster

    def spy(self, *arguments):
        asked.append((self.task_id, self.raylm_conn_id))
        return run_on_cluster(self, *arguments)

    monkeypatch.setattr(TeardownEngineOperator, "run_on_cluster", spy)

    assert set(run(dag, fake).values()) == {"success"}
    assert dict(asked) == {"end_another": "another", "end_other": found}
    assert fake.engines == {}


def test_a_sweep_that_fails_again_is_not_tried_again(airflow_db):
    """Such as one that the cluster's version of this package does not know."""
    with DAG("swept_again", schedule=None) as dag:
        SweepEnginesOperator(task_id="sweep", retries=1, retry_delay=timedelta(0))
    fake = FakeRayJobs()
    fake.fail("sweep", SpecError("bad"))

    assert run(dag, fake) == {"sweep": "failed"}
    assert len(fake.submitted) == 1


def test_an_airflow_without_a_name_deploys_and_sweeps_nothing(monkeypatch):
    """It would take another's engines for its own."""
    monkeypatch.delenv("AIRFLOW__RAYLM__INSTALLATION")
    with pytest.raises(SpecError, match=r"no name .* Set AIRFLOW__RAYLM__INSTALLATION"):
        installation()
    fake = FakeRayJobs()
    with fake.installed():
        assert installation() == "fake"
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example")
    assert installation() == "https://airflow.example"


def test_a_run_that_is_cleared_meets_the_same_job(airflow_db):
    """The deploy task finds the engine that it has brought up: its output differs, and the job is the same."""
    with DAG("cleared", schedule=None):
        infer = BatchInferenceOperator(task_id="x", engine="{{ params.engine }}", batch=BATCH)
    ref = {"application": "raylm-a-1", "deployment": "engine", "model": "m", "fingerprint": "f"}
    ref |= {"labels": {"installation": "i", "dag_id": "d", "run_id": "r", "engine": "a"}, "lease": {}}
    payloads = []
    for differing in (
        {"adopted": False, "deploy_seconds": 61.5, "dashboard_url": "http://ray:8265", "deployed_at": 1.8e9},
        {"adopted": True, "deploy_seconds": 0.4, "dashboard_url": "http://10.0.0.1:8265"},
    ):
        infer.engine = {**ref, **differing}
        payloads.append(infer.command({}).payload)

    assert payloads[0] == payloads[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"prompt": "Sum up {# shortly #}: ${text}"},
            r"prompt: what stands between \{# and #\} is a comment",
        ),
        ({"prompt": r"Is ${text} \frac{{1}}{{2}} or less?"}, r"prompt: a number between \{\{ and \}\} is a value"),
        ({"prompt": r"Find [0-9]{{1,3}} in ${text}"}, r"prompt: a number between"),
        ({"prompt": 'Answer as {{"label": "x"}}: ${text}'}, r"BatchSpec\.prompt: Jinja cannot read it"),
        ({"messages": [{"role": "user", "content": "100{% of ${text}"}]}, r"BatchSpec\.messages\.0\.content: Jinja"),
    ],
)
def test_text_that_jinja_would_eat_is_refused(fields, words):
    """When the DAG is parsed; with what to write instead."""
    with DAG("jinja", schedule=None), shared_engine("a", model="m") as engine:
        with pytest.raises(SpecError, match=words + r".*airflow\.sdk\.literal"):
            engine.infer("x", source="s3://in", output="s3://out/x", **fields)


def test_text_that_is_no_template_comes_through(airflow_db):
    """As a literal, or marked in Jinja's own way; what a row's column is put into is none."""
    braces = "{{ '{{' }}1{{ '}}' }} ${text}"
    odd = 'Answer as {{"label": "x"}} {# so #}: ${text}'
    with DAG("literal", schedule=None) as dag, shared_engine("a", model="m") as engine:
        for name, prompt in (
            ("l", literal(odd)),
            ("r", f"{{% raw %}}{odd}{{% endraw %}}"),
            ("p", "{ ${text} } { {"),
            ("b", braces),
        ):
            engine.infer(name, source="s3://in", prompt=prompt, output=f"s3://out/{name}")
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert [fake.batches[name].prompt for name in "lrpb"] == [odd, odd, "{ ${text} } { {", "{{1}} ${text}"]


def test_two_tasks_of_one_output_are_refused():
    """As far as it is known when the DAG is parsed."""
    with DAG("outputs", schedule=None), shared_engine("a", model="m") as engine:
        batch = {"source": "s3://in", "prompt": "${text}"}
        engine.infer("x", output="s3://out/x", **batch)
        with pytest.raises(SpecError, match=r"batch\.output: s3://out/x is the output of x, too"):
            engine.infer("y", output="s3://out/x/", **batch)
        engine.infer("z1", output="s3://out/{{ ds }}", **batch)
        engine.infer("z2", output="s3://out/{{ ds }}", **batch)


@pytest.mark.parametrize(
    "returned",
    [lambda: "a text", lambda: BatchSpec(source="s3://in", output="s3://out/x"), lambda: {"max_tokens": 0}],
)
def test_what_a_function_returns_wrongly_is_not_tried_again(airflow_db, returned):
    """An engine may hold a GPU meanwhile."""
    calls = []
    with DAG("returned", schedule=None) as dag, shared_engine("a", model="m") as engine:

        @engine.task(retries=1, retry_delay=timedelta(0), batch=BATCH)
        def x():
            calls.append(1)
            return returned()

        x()
    fake = FakeRayJobs()

    assert run(dag, fake)["x"] == "failed"
    assert len(calls) == 1


def test_the_fields_of_a_function_are_a_dict_or_a_spec():
    """What another task returns comes as an argument of the function."""
    with DAG("fields", schedule=None), shared_engine("a", model="m") as engine:

        @task
        def other():
            return BATCH

        for batch in (other(), "{{ params.batch }}"):

            @engine.task(batch=batch)
            def refused():
                return {}

            with pytest.raises(SpecError, match=r"batch: expected a dict .* as an argument of the function"):
                refused()

        @engine.task(batch=BatchSpec(**BATCH))
        def taken():
            return {"limit": 1}

        assert taken().operator.batch == BATCH


@pytest.mark.parametrize("deferrable", [False, True])
@pytest.mark.parametrize(
    ("error", "redeploy", "attempts"),
    [
        (SpecError("bad"), False, 1),
        (EngineGone("gone. Clear the deploy task"), False, 1),
        (EngineGone("gone. Clear the deploy task"), True, 2),
        (EngineError("a call failed"), False, 2),
    ],
)
def test_what_fails_again_is_not_tried_again(airflow_db, deferrable, error, redeploy, attempts):
    """An engine may hold a GPU meanwhile."""
    with DAG(f"again_{deferrable}_{redeploy}_{type(error).__name__}", schedule=None) as dag:
        with shared_engine("a", model="m", redeploy=redeploy) as engine:
            arguments = {"retries": 1, "retry_delay": timedelta(0), "deferrable": deferrable}
            engine.infer("x", source="s3://in", prompt="${text}", output="s3://out/x", **arguments)
    fake = FakeRayJobs()
    fake.fail("x", error)
    found = run(dag, fake)

    assert found["x"] == ("success" if attempts == 2 else "failed")
    assert sum(request.verb == "infer" for request in fake.submitted) == attempts
    assert fake.engines == {}


class ForgetsJobs(FakeRayJobs):
    """Ray's head is restarted under the first job of a verb: the job is gone, and so are the engines."""

    def __init__(self, verb):
        super().__init__()
        self._verb = verb

    def submit(self, request):
        submitted = super().submit(request)
        if request.verb == self._verb:
            self._verb = ""
            self._jobs.clear()
            self._engines.clear()
        return submitted


@pytest.mark.parametrize(
    ("verb", "deferrable", "redeploy", "infers", "state"),
    [
        ("deploy", True, False, 1, "success"),
        ("infer", True, True, 2, "success"),
        ("infer", False, False, 2, "failed"),
        ("teardown", False, False, 1, "success"),
    ],
)
def test_a_job_that_ray_has_forgotten_is_submitted_anew(airflow_db, verb, deferrable, redeploy, infers, state):
    """By the next try; one that finds no engine, and deploys none, is the last."""
    again = {"retries": 3, "retry_delay": timedelta(0), "deferrable": deferrable}
    with DAG(f"forgotten_{verb}_{redeploy}_{deferrable}", schedule=None, default_args=again) as dag:
        with shared_engine("a", model="m", redeploy=redeploy) as engine:
            engine.infer("x", source="s3://in", prompt="${text}", output="s3://out/x")
    fake = ForgetsJobs(verb)
    found = run(dag, fake)

    assert found == {"deploy_a": "success", "x": state, "teardown_a": "success"}
    assert sum(request.verb == "infer" for request in fake.submitted) == infers
    assert fake.engines == {}
