"""What must hold for any text: data is never evaluated, and no name leads out of its place."""

import json
import re

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from airflow_provider_raylm.cluster.batch.exchange import RowError
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.rows import EngineTraits, compile_step
from airflow_provider_raylm.cluster.batch.rows.templates import compile_template
from airflow_provider_raylm.errors import BatchError, RayLMError
from airflow_provider_raylm.naming import application_name, submission_id
from airflow_provider_raylm.specs import BatchReport, BatchSpec, Labels, Step
from airflow_provider_raylm.wire import error_line, outcome, result_line, said, said_line
from tests.scripted import attempt

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# Text that looks like what a template engine, a shell or this package's own log would act on.
HOSTILE = st.sampled_from(
    [
        *(
            "${b}",
            "$${a}",
            "{{ 1 }}",
            "{% x %}",
            "%s",
            "{0}",
            "$(id)",
            "`id`",
            "; rm -rf /",
            "'",
            '"',
            "\\",
            "\0",
            "\r",
        ),
        *("../..", "/etc/passwd", "\nRAYLM-RESULT {}", "\nraylm: x", "\u2028", "\x85", "a" * 5000),
    ]
)
ANY = st.one_of(TEXT, st.builds("".join, st.lists(HOSTILE | TEXT, max_size=4)))


@given(value=ANY, other=ANY)
def test_a_value_goes_into_a_prompt_as_it_is(value, other):
    """Whatever it looks like, between the template's own pieces and nowhere else."""
    assert compile_template("<${a}|$${a}|${b}>")({"a": value, "b": other}) == f"<{value}|${{a}}|{other}>"


@given(value=ANY)
def test_a_chat_has_the_roles_of_its_template(value):
    """No value makes a message of its own."""
    step = Step(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "${a}"}])
    assert compile_step(step, EngineTraits("m")).request({"a": value}).content == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": value},
    ]


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY, st.lists, max_leaves=5))
def test_any_value_is_text_or_a_row_error(value):
    """Never another exception, which would be taken for the engine's or the task's."""
    if value is None:
        with pytest.raises(RowError, match="is null"):
            compile_template("${a}")({"a": value})
    else:
        assert isinstance(compile_template("${a}")({"a": value}), str)


@given(dag_id=ANY, run_id=ANY, task_id=ANY)
def test_names_have_harmless_characters(dag_id, run_id, task_id):
    """In the application, which Serve makes paths of, and in the job's id, which is a part of a URL."""
    labels = Labels(installation=task_id, dag_id=dag_id, run_id=run_id, engine="e")
    harmless = re.compile(r"[a-z0-9-]{1,120}")
    assert harmless.fullmatch(application_name(labels))
    assert harmless.fullmatch(submission_id("infer", (dag_id, run_id, task_id, -1), {}, 1))


@given(one=st.tuples(ANY, ANY, ANY), two=st.tuples(ANY, ANY, ANY))
def test_owners_do_not_share_a_name(one, two):
    """However their parts are cut."""
    names = {application_name(Labels(installation=i, dag_id=dag, run_id=run, engine="e")) for i, dag, run in (one, two)}
    assert len(names) == len({one, two})


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(TEXT, min_size=1, max_size=5, unique=True), format=st.sampled_from(["parquet", "jsonl"]))
def test_ids_arrive_as_they_are_and_name_no_file(tmp_path_factory, ids, format):
    """An author's id column may hold anything."""
    base = tmp_path_factory.mktemp("ids")
    (base / "in.jsonl").write_text("".join(json.dumps({"text": "x", "key": one}) + "\n" for one in ids))
    output = base / "out"
    fields = {"source": str(base / "in.jsonl"), "output": str(output), "prompt": "${text}", "id_column": "key"}
    attempt(BatchSpec.model_validate({**fields, "output_format": format}))

    assert sorted(path.name for path in base.iterdir()) == ["in.jsonl", "out"]
    part = output / f"part-00000-000000000-{len(ids)}.{format}"
    rows = (
        pq.read_table(part).to_pylist() if format == "parquet" else map(json.loads, part.read_bytes().split(b"\n")[:-1])
    )
    assert [row[ROW_ID] for row in rows] == ids


@given(line=ANY)
def test_a_line_for_the_log_is_one_line(line):
    """Else text from a path or a message could pass for the job's outcome."""
    (only,) = said_line(7, line).splitlines()
    assert said(f"noise\n{only}\n") == {7: " ".join(line.splitlines())}


@given(message=ANY)
def test_an_error_arrives_as_it_was(message):
    """Of the same class, with the same text, whatever the text is."""
    with pytest.raises(RayLMError) as error:
        outcome(f"noise\n{error_line(BatchError(message))}\n")
    assert (type(error.value), str(error.value)) == (BatchError, message)


@example(place="a\u2028b")
@given(place=ANY)
def test_a_result_arrives_as_it_was(place):
    """Whatever the output is called."""
    counts = {"rows_in": 0, "rows_written": 0, "rows_quarantined": 0}
    names = {"output": place, "quarantine": place, "application": "a", "model": "m", "fingerprint": "f"}
    report = BatchReport(**counts, **names)
    assert outcome(f"noise\n{result_line(report.model_dump(mode='json'))}\n")["output"] == place
