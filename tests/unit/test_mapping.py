"""One inference task for each of several values: which tasks there are, when they run, and what cannot be written."""

import pytest
from airflow.sdk import DAG, Asset, literal, task

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.specs import BatchSpec
from airflow_provider_raylm.testing import FakeRayJobs
from tests.unit.test_authoring import before, run

OUTPUT = "s3://out/{{ ti.map_index }}"


def asked(fake):
    """Return the specs that reached the cluster, by the order of their sources."""
    return sorted(
        (one.payload["batch"] for one in fake.submitted if one.verb == "infer"), key=lambda one: one["source"]
    )


def test_a_field_is_mapped(airflow_db):
    """Over a list in the DAG, whose templates are rendered, and over what a task returns; between start and end."""
    with DAG("mapped_fields", schedule=None, params={"root": "s3://in"}) as dag:

        @task
        def folders():
            return ["s3://in/c", "s3://in/d"]

        with shared_engine("a", model="m", redeploy=True) as engine:
            listed = engine.infer.partial(task_id="listed", prompt="${text}", output=OUTPUT, max_tokens=4, retries=3)
            listed.expand(source=["{{ params.root }}/a", Asset(uri="s3://in/b", name="b")])
            engine.infer.partial("told", prompt="{{ params.root }} ${text}", output=f"{OUTPUT}/told").expand(
                source=folders()
            )
    fake = FakeRayJobs()

    assert {"deploy_a"} <= before(dag, "listed") & before(dag, "told")
    assert {"listed", "told"} <= before(dag, "teardown_a")
    assert dag.task_dict["listed"].retries == 3
    assert dag.task_dict["listed"].operator_name == "BatchInferenceOperator"
    assert set(run(dag, fake).values()) == {"success"}
    found = [(one["source"], one["output"], one["output_column"], one["prompt"]) for one in asked(fake)]
    assert found == [
        ("s3://in/a", "s3://out/0", "listed", "${text}"),
        ("s3://in/b", "s3://out/1", "listed", "${text}"),
        ("s3://in/c", "s3://out/0/told", "told", "s3://in ${text}"),
        ("s3://in/d", "s3://out/1/told", "told", "s3://in ${text}"),
    ]
    assert fake.engines == {}


def test_fields_are_mapped_together(airflow_db):
    """By dicts, in the DAG or from a task."""
    with DAG("mapped_kwargs", schedule=None, params={"root": "s3://in"}) as dag:

        @task
        def places():
            return [{"source": "s3://in/c", "output": "s3://out/c"}, {"source": "s3://in/d", "output": "s3://out/d"}]

        with shared_engine("a", model="m") as engine:
            engine.infer.partial("listed", prompt="${text}").expand_kwargs(
                [{"source": "{{ params.root }}/a", "output": "s3://out/a"}, {"source": "s3://in/b", "output": OUTPUT}]
            )
            engine.infer.partial("told", prompt="${text}", limit=1).expand_kwargs(places())
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    found = [(one["source"], one["output"]) for one in asked(fake)]
    assert found == [
        ("s3://in/a", "s3://out/a"),
        ("s3://in/b", "s3://out/1"),
        ("s3://in/c", "s3://out/c"),
        ("s3://in/d", "s3://out/d"),
    ]


# Airflow warns of what was never mapped.
@pytest.mark.filterwarnings("ignore:Task 'x' was never mapped")
@pytest.mark.parametrize(
    ("common", "mapped", "words"),
    [
        ({"output": OUTPUT, "promt": "x"}, {"source": ["a"]}, "promt"),
        ({"output": OUTPUT, "max_tokens": 0}, {"source": ["a"]}, r"BatchSpec\.max_tokens"),
        ({"output": OUTPUT}, {"source": ["a", 7]}, r"BatchSpec\.source"),
        ({"output": "s3://out"}, {"source": ["a", "b"]}, r"output: s3://out would be the output of every task"),
        ({"source": "a"}, {"output": ["s3://x", "s3://x/"]}, r"s3://x is the output of another task that x is mapped"),
        ({}, {"source": ["a"], "output": ["s3://x"]}, r"Pair them: expand_kwargs"),
        ({"output": OUTPUT, "source": "a"}, {"source": ["b"]}, r"source is given to partial, too"),
        ({"source": "a"}, {"output": ["s3://taken"]}, r"output: s3://taken is the output of other, too"),
        ({"output": OUTPUT, "prompt_file": "x"}, {"source": ["b"]}, "prompt is given, too"),
        ({"output": OUTPUT, "trigger_rule": "all_done"}, {"source": ["b"]}, "trigger_rule: x runs on what deploy_a"),
    ],
)
def test_what_cannot_be_mapped_is_refused(common, mapped, words):
    """When the DAG is parsed."""

    def parse():
        with DAG("bad_map", schedule=None), shared_engine("a", model="m") as engine:
            engine.infer("other", source="s3://in", prompt="x", output="s3://taken")
            engine.infer.partial("x", **{"prompt": "${text}", **common}).expand(**mapped)

    with pytest.raises((SpecError, TypeError), match=words):
        parse()


SPEC = {"source": "s3://in", "prompt": "x"}


def test_two_tasks_of_one_output_are_refused_though_one_is_mapped():
    """However it is spelt."""

    def parse():
        with DAG("one_output", schedule=None), shared_engine("a", model="m") as engine:
            engine.infer("plain", output="s3://out/x", **SPEC)
            batch = {**SPEC, "output": "s3://out/x//"}
            BatchInferenceOperator.partial(task_id="mapped", engine=engine.ref).expand(batch=[batch])

    with pytest.raises(SpecError, match=r"output: s3://out/x is the output of plain, too"):
        parse()


def test_specs_of_one_output_are_refused_where_they_are_mapped():
    """As objects, too."""

    def parse():
        with DAG("objects_of_one_output", schedule=None), shared_engine("a", model="m") as engine:
            specs = [BatchSpec(source=f"s3://in/{one}", prompt="x", output="s3://out/x") for one in "ab"]
            BatchInferenceOperator.partial(task_id="mapped", engine=engine.ref).expand(batch=specs)

    with pytest.raises(SpecError, match=r"output: s3://out/x is the output of another task that mapped is mapped to"):
        parse()


def test_two_tasks_of_one_output_are_refused_though_one_is_a_functions():
    """As far as it is known before the function has run."""

    def parse():
        with DAG("decorated_output", schedule=None), shared_engine("a", model="m") as engine:
            engine.infer("plain", output="file:///out/x", **SPEC)

            @engine.task(batch={"output": "/out/./x/"})
            def decorated():
                return {}

            decorated()

    with pytest.raises(SpecError, match=r"output: /out/x is the output of plain, too"):
        parse()


@pytest.mark.parametrize("whole", [False, True])
def test_templates_that_nobody_renders_are_refused(airflow_db, whole):
    """A task returned them: they may be anybody's text, and would go to the cluster as they are."""
    with DAG(f"unrendered_{whole}", schedule=None) as dag:

        @task
        def told():
            spec = {"source": "s3://in/{{ ds }}", "prompt": "x", "output": "s3://out"}
            return [spec] if whole else [spec["source"]]

        some = told()
        with shared_engine("a", model="m") as engine:
            if whole:
                BatchInferenceOperator.partial(task_id="x", engine=engine.ref, retries=2).expand(batch=some)
            else:
                engine.infer.partial("x", prompt=literal("{{"), output=OUTPUT, retries=2).expand(source=some)
    fake = FakeRayJobs()

    assert run(dag, fake)["x"] == "failed"
    assert [one.verb for one in fake.submitted] == ["deploy", "teardown"]
