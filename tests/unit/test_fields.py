"""What an author gives for a field, and the value that the cluster is asked with."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, Asset, ObjectStoragePath, task
from pydantic import ValidationError
from upath import UPath

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.compat import AirflowFailException, allow_class
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator, DeployEngineOperator, TeardownEngineOperator
from airflow_provider_raylm.specs import BatchSpec, EngineRef, EngineSpec, Step, build
from airflow_provider_raylm.testing import FakeRayJobs
from tests.unit.test_authoring import run

BATCH = {"source": "s3://in", "prompt": "${text}", "output": "s3://out/x"}
ENGINE = {"name": "e", "model": "m"}
MESSAGES = [{"role": "user", "content": "${text}"}]


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        (BatchSpec, "messages", MESSAGES),
        (BatchSpec, "stop", ["a", "b"]),
        (BatchSpec, "steps", [{"messages": MESSAGES}]),
        (BatchSpec, "columns", ["id"]),
        (BatchSpec, "columns", None),
        (BatchSpec, "extra_body", {"chat_template_kwargs": {"a": True}}),
        (BatchSpec, "source", ["s3://a", "s3://b"]),
        (BatchSpec, "source", {"rows_in": 1, "output": "s3://earlier"}),
        (EngineSpec, "engine_kwargs", {"max_model_len": 9, "enforce_eager": True}),
        (EngineSpec, "env", {"X": "1"}),
        (EngineSpec, "secret_env", {"X": "/x"}),
        (EngineSpec, "replicas", [1, 2]),
        (EngineSpec, "lease", {"idle_timeout": 5}),
        (EngineSpec, "runtime_env", {"pip": ["a"], "env_vars": {"X": "1"}}),
    ],
)
def test_a_list_or_an_object_is_its_json_text_too(spec, field, value):
    """As a template with ``tojson`` makes it of a parameter; also the whole spec, and what stands in it."""
    rest = {**BATCH, "prompt": None if field in ("messages", "steps") else "${text}"} if spec is BatchSpec else ENGINE
    expected = build(spec, {**rest, field: value})

    assert build(spec, {**rest, field: json.dumps(value)}) == expected
    assert build(spec, json.dumps({**rest, field: value})) == expected
    assert build(spec, json.dumps({**rest, field: json.dumps(value)})) == expected
    if field == "messages":
        assert build(spec, {**rest, field: [json.dumps(one) for one in value]}) == expected


def test_what_looks_like_json_is_text_where_a_field_holds_text():
    """And text that is none stays: a glob may begin with a bracket."""
    spec = build(BatchSpec, {**BATCH, "source": "[ab]/*.parquet", "prompt": '["${text}"]', "id_column": "{}"})

    assert (spec.sources, spec.prompt, spec.id_column) == (("[ab]/*.parquet",), '["${text}"]', "{}")
    with pytest.raises(SpecError, match=r"BatchSpec\.stop: expected a list, got the text '\[a', which is no JSON"):
        build(BatchSpec, {**BATCH, "stop": "[a"})
    with pytest.raises(SpecError, match=r"BatchSpec\.steps\.0: expected an object, got the text '\{a', which"):
        build(BatchSpec, {**BATCH, "prompt": None, "steps": ["{a"]})


@pytest.mark.parametrize("native", [False, True])
def test_fields_are_text_whatever_the_dag_renders(airflow_db, native):
    """But a function's own arguments are what its DAG says."""
    params = {"m": MESSAGES, "one": 1, "quoted": '"a"', "env": {"X": "1", "Y": "true"}}
    found = []
    with DAG(f"native_{native}", schedule=None, params=params, render_template_as_native_obj=native) as dag:
        env = {"X": "1", "N": "{{ params.one }}", "Q": "{{ params.quoted }}"}
        with shared_engine("a", model="123", env=env, engine_kwargs="{{ params.env | tojson }}") as engine:
            where = {"source": "s3://in", "output": "s3://out/x"}
            engine.infer("x", messages="{{ params.m | tojson }}", max_tokens="{{ params.one }}", **where)
            engine.infer("y", prompt="'${text}'", output_column="{{ params.one }}", source="s3://in", output="s3://y")

            @engine.task(batch={"source": "s3://in", "output": "s3://z", "prompt": "7"})
            def z(one):
                found.append(one)
                return {}

            z("{{ params.one }}")
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert fake.submitted[0].payload["engine"]["env"] == {"X": "1", "N": "1", "Q": '"a"'}
    assert fake.submitted[0].payload["engine"]["engine_kwargs"] == params["env"]
    assert (fake.submitted[0].payload["engine"]["model"], fake.batches["z"].prompt) == ("123", "7")
    assert (fake.batches["x"].messages, fake.batches["x"].max_tokens) == (tuple(MESSAGES), 1)
    assert (fake.batches["y"].prompt, fake.batches["y"].output_column) == ("'${text}'", "1")
    assert found == [1 if native else "1"]


def test_line_breaks_of_a_field_arrive(airflow_db, tmp_path):
    """Those at its end, too, with a template in it or none; of a file, all but the last."""
    stop, filled = ["\n", "\n\n", "END\n", "\r\n"], "{{ params.a }}\n\n"
    (tmp_path / "plain.txt").write_text("Q: ${text}\nA:\n\n")
    (tmp_path / "filled.jinja").write_text('{% include "rules.jinja" %}Q: ${text}\n\n')
    (tmp_path / "rules.jinja").write_text("Rule {{ params.a }}.\n")
    where = {"source": "s3://in", "stop": stop}
    with DAG("breaks", schedule=None, params={"a": "A"}, template_searchpath=[str(tmp_path)]) as dag:
        with shared_engine("a", model="m") as engine:
            engine.infer("plain", prompt="Q: ${text}\r\nA:\n", output="s3://plain", **where)
            steps = [{"prompt": "Q: ${text}\nA:\n", "stop": stop, "output_column": "a"}, {"prompt": filled}]
            engine.infer("steps", steps=steps, source="s3://in", output="s3://steps")
            engine.infer("file", prompt_file="plain.txt", output="s3://file", **where)
            engine.infer("template", prompt_file="filled.jinja", output="s3://template", **where)
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    first, second = fake.batches["steps"].steps
    assert (fake.batches["plain"].prompt, first.prompt, second.prompt) == (
        "Q: ${text}\r\nA:\n",
        "Q: ${text}\nA:\n",
        "A\n\n",
    )
    assert {batch.stop for name, batch in fake.batches.items() if name != "steps"} | {first.stop} == {tuple(stop)}
    assert fake.batches["file"].prompt == "Q: ${text}\nA:\n"
    assert fake.batches["template"].prompt == "Rule A.Q: ${text}\n"


def test_prompts_from_files(airflow_db, tmp_path):
    """From where Airflow finds templates: the DAG's folder, and those that the DAG adds; for steps and maps as well."""
    (tmp_path / "plain.txt").write_text('Answer {{"label": "x"}}: ${text}\n')
    (tmp_path / "filled.jinja").write_text("In {{ params.language }}: ${text}\n")
    files = {"plain": 'Answer {{"label": "x"}}: ${text}', "filled": "In Latin: ${text}"}
    params = {"language": "Latin", "file": "filled.jinja"}
    with DAG("files", schedule=None, params=params, template_searchpath=[str(tmp_path)]) as dag:
        with shared_engine("a", model="m") as engine:

            def places(name):
                return {"source": "s3://in", "output": f"s3://out/{name}"}

            engine.infer("plain", prompt_file="plain.txt", **places("plain"))
            engine.infer("filled", prompt_file="filled.jinja", **places("filled"))
            engine.infer("named", prompt_file="{{ params.file }}", **places("named"))
            steps = [{"prompt_file": "plain.txt", "output_column": "a"}, {"prompt_file": "{{ params.file }}"}]
            engine.infer("steps", steps=steps, **places("steps"))
            mapped = engine.infer.partial("mapped", prompt_file="filled.jinja", output="s3://out/m{{ ti.map_index }}")
            mapped.expand(source=["s3://in"])

            @engine.task
            def returned():
                return {"prompt_file": "filled.jinja", **places("returned")}

            returned()
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    found = {name: batch.prompt for name, batch in fake.batches.items()}
    expected = {"plain": files["plain"], **dict.fromkeys(("filled", "named", "mapped", "returned"), files["filled"])}
    assert {**expected, "steps": None} == found
    assert [step.prompt for step in fake.batches["steps"].steps] == [files["plain"], files["filled"]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_file": "nowhere.txt"}, r"prompt_file: there is no file nowhere\.txt in .*template_searchpath"),
        ({"steps": [{"prompt_file": "../../etc/passwd"}]}, r"prompt_file: there is no file"),
        ({"prompt_file": "x.txt", "prompt": "${text}"}, r"prompt_file: prompt is given, too"),
        ({"prompt_file": 7}, r"prompt_file: expected the name of a file, got 7"),
        ({"prompt_file": "{{ ds }}", "messages": MESSAGES, "max_tokens": 0}, r"BatchSpec\.max_tokens"),
    ],
)
def test_a_file_that_is_not_there_is_refused(fields, words):
    """When the DAG is parsed."""
    with DAG("no_file", schedule=None), shared_engine("a", model="m") as engine:
        with pytest.raises(SpecError, match=words):
            engine.infer("x", source="s3://in", output="s3://out", **fields)


def test_assets_and_paths_are_places(airflow_db, monkeypatch):
    """An asset that is read is an inlet, one that is written an outlet, unless there are others; a path's connection
    is the storage's."""
    monkeypatch.setenv("AIRFLOW_CONN_STORE", "aws://key:hidden@")
    reviews, labels = Asset("reviews", "s3://in/reviews"), Asset("labels", "s3://out/labels")
    other = Asset("other", "s3://other")
    with DAG("assets", schedule=None) as dag, shared_engine("a", model="m") as engine:
        engine.infer("x", source=[reviews, "s3://in/more"], prompt="${text}", output=labels)
        engine.infer("y", source=reviews, prompt="${text}", output=Asset("s3://out/y"), outlets=[other])
        paths = {
            "source": ObjectStoragePath("s3://store@in/{{ params.day }}"),
            "output": ObjectStoragePath("s3://out/z"),
        }
        engine.infer("z", prompt="${text}", params={"day": "1"}, **paths)
        on_disk = {"source": Path("/in/{{ params.day }}"), "output": "s3://out/disk"}
        engine.infer("disk", prompt="${text}", params={"day": "1"}, **on_disk)
        BatchInferenceOperator.partial(task_id="mapped", engine=engine.ref).expand(
            batch=[{"source": reviews, "prompt": "${text}", "output": ObjectStoragePath("s3://out/m")}]
        )
    fake = FakeRayJobs()

    assert (dag.task_dict["x"].inlets, dag.task_dict["x"].outlets) == ([reviews], [labels])
    assert (dag.task_dict["y"].inlets, dag.task_dict["y"].outlets) == ([reviews], [other])
    assert set(run(dag, fake).values()) == {"success"}
    places = {name: (batch.sources, batch.output) for name, batch in fake.batches.items()}
    assert places == {
        "x": (("s3://in/reviews", "s3://in/more"), "s3://out/labels"),
        "y": (("s3://in/reviews",), "s3://out/y"),
        "z": (("s3://in/1",), "s3://out/z"),
        "disk": (("/in/1",), "s3://out/disk"),
        "mapped": (("s3://in/reviews",), "s3://out/m"),
    }
    storage = {one.metadata["task_id"]: dict(one.storage) for one in fake.submitted}
    assert (storage["x"], storage["z"]["s3"]["key"]) == ({}, "key")
    with DAG("no_place", schedule=None), shared_engine("a", model="m") as engine:
        with pytest.raises(SpecError, match="The asset 'reviews' names no place"):
            engine.infer("x", source=Asset("reviews"), prompt="${text}", output="s3://out")
        with pytest.raises(SpecError, match=r"The path s3://in/x is of a kind .* or ObjectStoragePath"):
            engine.infer("y", source=UPath("s3://in/x"), prompt="${text}", output="s3://out")


def test_a_template_that_asks_for_what_is_not_there_is_not_tried_again(airflow_db):
    """By the name of its field: an engine may hold a GPU meanwhile."""
    tries = []
    again = {"retries": 2, "retry_delay": timedelta(0)}
    with DAG("undefined", schedule=None, user_defined_macros={"try": lambda: tries.append(1)}) as dag:
        with shared_engine("a", model="m") as engine:
            source = "s3://{{ try() }}{{ parms.x }}"
            asking = engine.infer("x", source=source, prompt="${text}", output="s3://out", **again)
    fake = FakeRayJobs()

    assert run(dag, fake)["x"] == "failed"
    assert len(tries) == 1
    with pytest.raises(AirflowFailException, match="batch: a template asks for .*: 'parms' is undefined"):
        asking._do_render_template_fields(asking, ["batch"], {}, asking.get_template_env(), set())


@pytest.mark.skipif(
    not allow_class.__module__.startswith("airflow."), reason="Airflow is told in its configuration before 3.3"
)
def test_specs_are_objects_that_tasks_return(airflow_db):
    """Of an engine, of an inference, and the reference of an engine; a report's source, too."""
    with DAG("objects", schedule=None) as dag:

        @task
        def engine_spec():
            return EngineSpec(name="e", model="m", replicas=(1, 2), runtime_env={"env_vars": {"A": "b"}})

        @task
        def batch_spec():
            return BatchSpec(source="s3://in", steps=(Step(prompt="${text}", stop=("x",)),), output="s3://out")

        @task
        def reference(ref):
            return EngineRef(**ref)

        deploy = DeployEngineOperator(task_id="deploy", engine=engine_spec())
        asked = BatchInferenceOperator(task_id="x", engine=reference(deploy.output), batch=batch_spec())
        deploy >> asked >> TeardownEngineOperator(task_id="teardown", engine=deploy.output)
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert fake.submitted[0].payload["engine"] == {
        "name": "e",
        "model": "m",
        "replicas": [1, 2],
        "runtime_env": {"env_vars": {"A": "b"}},
    }
    assert fake.batches["x"] == BatchSpec(
        source="s3://in", steps=[{"prompt": "${text}", "stop": ["x"]}], output="s3://out"
    )


def test_only_spec_errors_escape():
    """Whichever way a spec is made, or changed."""
    for make in (
        lambda: BatchSpec(**{**BATCH, "max_tokens": 0}),
        lambda: BatchSpec.model_validate({**BATCH, "max_tokens": 0}),
        lambda: Step(prompt="x", max_tokens=0),
        lambda: BatchSpec(**{**BATCH, "prompt": None, "steps": [{"prompt": "x", "max_tokens": 0}]}),
        lambda: EngineSpec(name="e"),
        lambda: setattr(Step(prompt="x"), "prompt", "y"),
    ):
        with pytest.raises(SpecError, match=r"Spec\.|Step\.") as error:
            make()
        assert not isinstance(error.value, ValidationError)


def test_a_rule_that_no_task_behind_a_setup_may_have_is_refused():
    """In words that say what to do; for any task behind the deploy task."""

    def parse(add):
        with DAG("rules", schedule=None), shared_engine("a", model="m") as engine:
            add(engine)

    def mapped(engine):
        partial = BatchInferenceOperator.partial(task_id="x", engine=engine.ref, trigger_rule="all_done")
        partial.expand(batch=[BATCH])

    def mapped_without_the_engine(engine):
        task(task_id="x", trigger_rule="none_failed")(lambda row: row).expand(row=[1, 2])

    def plain(engine):
        engine.infer("x", trigger_rule="none_failed", **BATCH)

    words = r"trigger_rule: x runs on what deploy_a sets up.*Give '(none_failed|all_done)' to.*EmptyOperator\(task_id="
    for add in (plain, mapped, mapped_without_the_engine):
        with pytest.raises(SpecError, match=words):
            parse(add)


def test_a_decorated_task_leaves_one_xcom(airflow_db):
    """Its report, though the function says that it returns a dict; and the links."""
    with DAG("one_xcom", schedule=None) as dag, shared_engine("a", model="m") as engine:

        @engine.task(batch=BATCH)
        def x() -> dict[str, Any]:
            return {}

        @task
        def found(ti=None):
            assert ti.xcom_pull("x", key="rows_in") is None
            assert ti.xcom_pull("x")["rows_in"] == 1

        x() >> found()

    assert set(run(dag, FakeRayJobs()).values()) == {"success"}


def test_a_task_that_had_no_job_asks_for_no_links(airflow_db, monkeypatch):
    """What is not there would be an error in its log, once for each."""
    asked = []
    from airflow.sdk.execution_time.xcom import XCom

    monkeypatch.setattr(XCom, "get_value", lambda **key: asked.append(key))
    with DAG("no_links", schedule=None):
        operator = BatchInferenceOperator(task_id="x", engine="{{ 1 }}", batch=BATCH)
    for link in operator.operator_extra_links:
        assert link.get_link(operator, ti_key=None) == ""
    assert asked == []
    # Of a task that was deferred another process knows.
    operator.links = None
    operator.operator_extra_links[0].get_link(operator, ti_key=None)
    assert len(asked) == 1
