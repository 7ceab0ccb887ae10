"""What a look at a task finds before it runs: its plan, and what some rows come to; nothing is written."""

import base64
import json
import threading
import time

import pytest

from airflow_provider_raylm.cluster.batch import preview
from airflow_provider_raylm.cluster.batch.exchange import Answer
from airflow_provider_raylm.cluster.batch.loop import drained
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.sealing import new_pad, seal, unseal
from airflow_provider_raylm.specs import BatchSpec
from airflow_provider_raylm.specs.previews import PreviewRow
from tests.scripted import asking, shouts


def spec(folder, **fields):
    return BatchSpec(**{"source": f"{folder}/in", "prompt": "${text}", "output": f"{folder}/out", **fields})


@pytest.fixture
def source(tmp_path):
    """Two files of 3 and 7 rows."""
    (tmp_path / "in").mkdir()
    for name, rows in (("a", range(3)), ("b", range(3, 10))):
        lines = "".join(f'{{"text": "row {row}", "stars": {row}}}\n' for row in rows)
        (tmp_path / "in" / f"{name}.jsonl").write_text(lines)
    return tmp_path


def silent(line):
    """Hear nothing."""


def test_a_plan_says_what_a_task_would_read(source):
    """Files, bytes and the columns that it needs and makes; rows where they are known without reading."""
    found = preview.plan(spec(source, limit=5, columns=["text"]), silent)

    assert (found.files, found.rows) == (2, 5)
    assert found.bytes == sum(path.stat().st_size for path in (source / "in").iterdir())
    assert found.columns == {"text": "string"}
    assert list(found.answers)[:3] == ["text", "response", "raylm_row_id"]
    assert [path.name for path in source.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"source": "/no/such/*.parquet"}, "matches no file"),
        ({"prompt": "${txet}"}, "txet"),
        ({"preprocess": "no_such_module:f"}, "no_such_module"),
        ({"output_schema": "no_such_module:Model"}, "no_such_module"),
    ],
)
def test_a_plan_finds_what_a_task_would_fail_of(source, fields, error):
    """Before a row is asked, and before an engine is paid for."""
    with pytest.raises(BatchError, match=error):
        preview.plan(spec(source, **fields), silent)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(chosen, made, spec, ask=shouts, at_a_time=4):
    """Return what comes of sampled rows, on an engine that a function is."""
    return list(drained(lambda: preview.answered(spec, EngineTraits("m"), chosen, asking(ask), at_a_time)))


def test_the_first_rows_are_asked_and_nothing_is_written(source):
    """Each row has its question, its answer and its tokens; a failed one its reason."""
    told = spec(source, prompt="${text}!", preprocess=None)
    made, chosen = preview.first_rows(told, 4, silent)
    found = rows_of(chosen, made, told)

    assert [row.row_id for row, _ in found] == chosen["raylm_row_id"].to_pylist()
    assert [row.asked for row, _ in found] == [(f"row {number}!",) for number in range(4)]
    assert [row.answer for row, _ in found] == [{"response": f"ROW {number}!"} for number in range(4)]
    assert {(one.prompt_tokens, one.completion_tokens, one.reason) for _, one in found} == {(2, 3, None)}
    assert {row.finish_reason for row, _ in found} == {"stop"}
    assert [path.name for path in source.iterdir()] == ["in"]


def test_failed_rows_say_why(source):
    """And cost what they cost."""
    steps = [{"prompt": "${text}", "output_column": "a"}, {"prompt": "bad ${a}", "output_column": "b"}]
    told = spec(source, prompt=None, steps=steps)
    made, chosen = preview.first_rows(told, 1, silent)
    ((row, counts),) = rows_of(chosen, made, told)

    assert (row.asked, row.answer, row.message) == (("row 0", "bad ROW 0"), {}, "refused")
    assert (counts.reason, counts.prompt_tokens, counts.completion_tokens) == ("invalid_request", 2, 3)


def test_chats_are_shown_turn_by_turn(source):
    """With who says what."""
    told = spec(
        source,
        prompt=None,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "${text}"}],
    )
    made, chosen = preview.first_rows(told, 1, silent)
    ((row, _),) = rows_of(chosen, made, told, lambda fields, prompts: [Answer("yes", "stop", 5, 1)] * len(prompts))

    assert row.asked == ("system: Be brief.\nuser: row 0",)


def test_a_sample_comes_from_all_over_the_source(source):
    """And the plan knows all rows then, also of files of which only reading tells."""
    line = "word " * 2_000
    (source / "in" / "c.csv").write_text("text,stars\n" + "".join(f"line {row} {line},1\n" for row in range(20)))
    said = []
    told = spec(source, block_rows=4, columns=["text"])
    made, chosen = preview.spread_rows(told, 6, said.append)

    assert made.rows == preview.planned(told, made).rows == 30
    assert said == ["counting the rows of 1 files, of which only reading tells"]
    texts = chosen["text"].to_pylist()
    assert len(texts) == len(set(texts)) == 6
    assert {text.split()[0] for text in texts} == {"row", "line"}
    assert preview.spread_rows(told, 100, silent)[1].num_rows == 30


def test_no_more_rows_are_asked_at_a_time_than_the_engine_works_on(source):
    """So that a row's seconds are its own."""
    at_work, most, lock = [], [], threading.Lock()

    def ask(fields, prompts):
        with lock:
            at_work.append(1)
            most.append(len(at_work))
        time.sleep(0.02)
        with lock:
            at_work.pop()
        return shouts(fields, prompts)

    told = spec(source)
    made, chosen = preview.first_rows(told, 10, silent)
    found = rows_of(chosen, made, told, ask, at_a_time=2)
    assert max(most) == 2
    assert all(0.02 <= one.seconds < 1 for _, one in found)


def test_an_empty_source_has_no_rows(tmp_path):
    (tmp_path / "in.csv").write_text("text\n")
    told = spec(tmp_path, source=str(tmp_path / "in.csv"))
    for sample in (preview.first_rows, preview.spread_rows):
        made, chosen = sample(told, 5, silent)
        assert rows_of(chosen, made, told) == []


# --- what a log may show ----------------------------------------------------------------------------------------------


def test_rows_travel_sealed():
    """Who has the pad reads them; who has the log reads nothing of them."""
    rows = [PreviewRow(row_id="1", asked=("a s3cr3t question",), answer={"a": "größer"})]
    pad = new_pad()
    sealed = preview.sealed(rows, pad)

    assert [PreviewRow(**one) for one in json.loads(unseal(sealed, pad))] == rows
    assert len(sealed) < 400
    assert b"s3cr3t" not in base64.b64decode(sealed)
    assert preview.sealed(rows, new_pad()) != sealed
    with pytest.raises(BatchError, match="raylm preview"):
        preview.sealed(rows, b"")


def test_long_texts_are_cut_until_all_fit():
    """A hundred rows of ten columns; how much is missing is said."""
    long = PreviewRow(row_id="1", asked=("ä" * 5_000,) * 3, answer={f"c{column}": "ö" * 5_000 for column in range(10)})
    pad = new_pad()
    rows = json.loads(unseal(preview.sealed([long] * 100, pad), pad))

    assert len(rows) == 100
    assert rows[0]["answer"]["c9"].startswith("öööö")
    assert rows[0]["answer"]["c9"].endswith(" more characters)")
    (one,) = json.loads(unseal(preview.sealed([long], pad), pad))
    assert one["asked"][0] == f"{'ä' * 1_000}… (4,000 more characters)"


def test_what_is_longer_than_a_pad_is_not_sealed():
    """A pad that is used twice hides nothing."""
    with pytest.raises(ValueError, match="pad"):
        seal("x" * 10, b"short")
