"""Fields that have been renamed: the old name means the same for a while, and is told of where it is written."""

import json
import warnings
from contextlib import contextmanager

import pytest
from airflow.sdk import DAG, task

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.naming import answers_fingerprint, fingerprint
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator, DeployEngineOperator
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, Lease, Media, RuntimeEnv, Step, build, check_unrendered
from airflow_provider_raylm.testing import FakeRayJobs
from tests.unit.test_authoring import run
from tests.unit.test_mapping import OUTPUT, asked

ENGINE = {"name": "e", "model": "m"}
BATCH = {"source": "s3://in", "prompt": "Say ${text}", "output": "s3://out"}
RENAMED = [
    (EngineSpec, ENGINE, "served_name", "served_model_name", "x"),
    (EngineSpec, ENGINE, "gpus", "gpus_per_worker", 0.5),
    (EngineSpec, ENGINE, "cpus", "num_cpus", 4),
    (BatchSpec, BATCH, "error_budget", "max_failed_fraction", 0.5),
]
renamed = pytest.mark.parametrize(("spec", "fields", "old", "new", "value"), RENAMED)


def templated(value):
    return isinstance(value, str) and "{{" in value


@contextmanager
def told(*texts):
    """Expect these warnings, each of a line of this module, and no other."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=FutureWarning)
        yield
    assert [str(one.message).partition(";")[0] for one in found] == list(texts)
    assert {one.filename for one in found} <= {__file__}, found


@renamed
def test_the_old_name_is_read(spec, fields, old, new, value):
    """However a spec is built; once told of, with the name of today and the release that ends it."""
    text = f"{spec.__name__}.{old} is called {new} now"
    by_new = spec(**fields, **{new: value})
    given = {**fields, old: value}

    for make in (
        lambda: spec(**given),
        lambda: build(spec, given),
        lambda: spec.model_validate(given),
        lambda: build(spec, json.dumps(given)),
        lambda: spec(**fields).model_copy(update={old: value}),
    ):
        with told(text):
            assert make() == by_new
    with pytest.warns(FutureWarning, match=r"; the old name is removed in 0\.3$"):
        spec(**given)


@renamed
def test_both_names_are_refused(spec, fields, old, new, value):
    """Even where they say the same, or a template says it."""
    words = f"{old}: its name is {new} now, which is given, too"

    for other in (value, "{{ params.x }}"):
        with pytest.raises(SpecError, match=words):
            check_unrendered(spec, {**fields, old: value, new: other}, templated)
    with pytest.raises(SpecError, match=words):
        spec(**fields, **{old: value, new: value})


@renamed
def test_a_bad_value_is_named_by_the_name_of_today(spec, fields, old, new, value):
    """When the DAG is parsed; a template under the old name is left for later."""
    text = f"{spec.__name__}.{old} is called {new} now"

    with told(text), pytest.raises(SpecError, match=rf"{spec.__name__}\.{new}: "):
        check_unrendered(spec, {**fields, old: []}, templated)
    with told(text):
        check_unrendered(spec, {**fields, old: "{{ params.x }}"}, templated)


def test_an_engine_has_the_fingerprint_of_its_first_names():
    """Written down before the fields were renamed: engines and outputs of then are adopted and resumed."""
    some = {"served_model_name": "x", "gpus_per_worker": 0.5, "num_cpus": 4}
    all_of_it = EngineSpec(**ENGINE, **some, tokenizer="t", env={"A": "b"})

    assert fingerprint(EngineSpec(**ENGINE, served_model_name="x")) == "1629dd875ec3"
    assert fingerprint(EngineSpec(**ENGINE, gpus_per_worker=0)) == "80c04d2f450f"
    assert fingerprint(EngineSpec(**ENGINE, num_cpus=4)) == "3f69eb5cc501"
    assert (fingerprint(all_of_it), answers_fingerprint(all_of_it)) == ("5a18e5f290e3", "082d6c48af87")


@renamed
def test_either_name_has_the_same_fingerprint(spec, fields, old, new, value):
    """So that a DAG may be changed between a run and its retry."""
    with told(f"{spec.__name__}.{old} is called {new} now"):
        by_old = spec(**fields, **{old: value})

    assert fingerprint(by_old) == fingerprint(spec(**fields, **{new: value}))


def test_only_whole_specs_have_old_names():
    """Of a value within one, a fingerprint would not know the first name; and what was a name is none any more."""
    assert [spec for spec in (Step, Lease, Media, RuntimeEnv) if spec.old_names] == []
    for spec in (EngineSpec, BatchSpec):
        assert set(spec.old_names.values()) <= set(spec.model_fields)
        assert spec.old_names.keys().isdisjoint(spec.model_fields)


def test_an_authors_keywords_are_told_of_once(airflow_db):
    """Though the engine's are for several tasks: of the deploy task, and of each that may deploy again."""
    engines = ("EngineSpec.gpus is called gpus_per_worker now", "EngineSpec.cpus is called num_cpus now")
    with DAG("old_keywords", schedule=None, params={"gpus": 0}) as dag:
        with told(*engines), shared_engine("a", model="m", gpus="{{ params.gpus }}", cpus=2, redeploy=True) as engine:
            engine.infer("one", **BATCH)
            engine.infer("two", **{**BATCH, "output": "s3://two"})
    fake = FakeRayJobs()

    with told():
        assert set(run(dag, fake).values()) == {"success"}
    deploy, one, *_ = fake.submitted
    wanted = {"name": "a", "model": "m", "gpus_per_worker": 0, "num_cpus": 2}
    assert deploy.payload["engine"] == one.payload["redeploy"] == wanted


def test_operators_take_old_names(airflow_db):
    """In the dicts that they are given."""
    both = ("EngineSpec.gpus is called gpus_per_worker now", "BatchSpec.error_budget is called max_failed_fraction now")
    with DAG("old_dicts", schedule=None), told(*both):
        deploy = DeployEngineOperator(task_id="deploy", engine={**ENGINE, "gpus": 0})
        BatchInferenceOperator(task_id="x", engine=deploy.output, batch={**BATCH, "error_budget": "{{ params.x }}"})


def test_what_a_function_returns_goes_over_its_tasks_fields(airflow_db):
    """Under whichever name either has it."""
    with DAG("old_returned", schedule=None) as dag, shared_engine("a", model="m") as engine:

        @engine.task(batch={**BATCH, "max_failed_fraction": 0.1})
        def returned():
            return {"error_budget": 0.5}

        with told("BatchSpec.error_budget is called max_failed_fraction now"):

            @engine.task(batch={**BATCH, "source": "s3://other", "output": "s3://elsewhere", "error_budget": 0.1})
            def given():
                return {"max_failed_fraction": 0.7}

            given()
        returned()
    fake = FakeRayJobs()

    with pytest.warns(FutureWarning, match=r"BatchSpec\.error_budget"):
        assert set(run(dag, fake).values()) == {"success"}
    assert [one["max_failed_fraction"] for one in asked(fake)] == [0.5, 0.7]


def test_fields_are_mapped_by_old_names(airflow_db):
    """By keyword, by dicts of the DAG, and by dicts that a task returns."""
    with DAG("old_mapped", schedule=None) as dag:

        @task
        def specs(number):
            place = {"source": f"s3://{number}", "output": f"s3://out/{number}"}
            return [{**place, "prompt": "x", "error_budget": 0.4}]

        with shared_engine("a", model="m") as engine:
            text = "BatchSpec.error_budget is called max_failed_fraction now"
            with told(text):
                engine.infer.partial("a", source="s3://1", prompt="x", error_budget=0.1).expand(output=["s3://out/1"])
            with told(text):
                partial = engine.infer.partial("b", source="s3://2", prompt="x", output=f"{OUTPUT}/2")
                partial.expand(error_budget=[0.2])
            with told(text):
                mapped = [{"source": "s3://3", "output": "s3://out/3", "error_budget": 0.3}]
                engine.infer.partial("c", prompt="x").expand_kwargs(mapped)
            engine.infer.partial("d", max_failed_fraction=1).expand_kwargs(specs(4))
            whole = BatchInferenceOperator.partial(task_id="e", engine=engine.ref)
            whole.expand(batch=specs(5))
    fake = FakeRayJobs()

    with pytest.warns(FutureWarning, match=r"BatchSpec\.error_budget"):
        assert set(run(dag, fake).values()) == {"success"}
    assert [one["max_failed_fraction"] for one in asked(fake)] == [0.1, 0.2, 0.3, 0.4, 0.4]


# Airflow warns of what was never mapped.
@pytest.mark.filterwarnings("ignore:Task 'x' was never mapped")
def test_a_field_is_not_mapped_under_its_other_name():
    """Given to partial, too."""

    def parse():
        with DAG("old_twice", schedule=None), shared_engine("a", model="m") as engine:
            partial = engine.infer.partial("x", source="s3://1", prompt="x", output=OUTPUT, max_failed_fraction=1)
            partial.expand(error_budget=[0.5])

    with pytest.warns(FutureWarning), pytest.raises(SpecError, match="max_failed_fraction is given to partial, too"):
        parse()
