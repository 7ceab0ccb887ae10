"""What a job tells of its first failed rows while it works: enough to find them, and nothing that they hold."""

import json

import pyarrow as pa
import pytest

from airflow_provider_raylm.cluster import surroundings
from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.parts import Written
from airflow_provider_raylm.cluster.batch.report import COUNTS, ENGINE_COUNTS, Tally, count_block
from airflow_provider_raylm.cluster.batch.stage import MESSAGE, REASON, Answered
from airflow_provider_raylm.cluster.surroundings import Surroundings
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs import BatchSpec, Progress
from airflow_provider_raylm.wire import progress_in, progress_line, said
from tests.scripted import attempt


def counted(failed, name="0-0"):
    """Return the counts of a block whose rows have all failed, as they come through Ray Data."""
    rows = pa.table(dict(zip((ROW_ID, REASON, MESSAGE), map(list, zip(*failed, strict=True)), strict=True)))
    block = Written(name, rows.num_rows)
    answered = Answered(rows.slice(0, 0), rows, dict.fromkeys(ENGINE_COUNTS, 0))
    (counts,) = pa.Table.from_pylist([count_block(block, answered)], schema=COUNTS).to_pylist()
    return counts


def told(*blocks):
    """Return the line of a job's log after some blocks, and the record that the page has of it."""
    tally = Tally()
    for block in blocks:
        tally.add(block)
    line = progress_line(7, tally.progress(10))
    (record,) = progress_in(f"{line}\n")
    return line, record


def shapes():
    """Return rows that fail in the ways that a task has, by their reason, each with a word that no one else says."""
    return [
        {"id": "null_value", "text": None},
        {"id": "empty_prompt", "text": " "},
        {"id": "invalid_request", "text": "PRIVATE refuse"},
        {"id": "prompt_too_long", "text": "PRIVATE long"},
        {"id": "invalid_output", "text": "PRIVATE unfit"},
        {"id": "engine_failure", "text": "PRIVATE kill"},
        {"id": "row_function", "text": "PRIVATE raise"},
        {"id": "invalid_conversation", "turns": "PRIVATE {"},
        {
            "id": "invalid_image",
            "turns": [{"role": "user", "content": [{"type": "image", "image": "http://PRIVATE/a.png"}]}],
        },
        {"id": "invalid_parameter", "text": "fine", "budget": "PRIVATE"},
    ]


def quoting(fields, contents):
    """Refuse whatever is asked, quoting all of it."""
    reasons = {"refuse": "invalid_request", "long": "prompt_too_long", "kill": "engine_failure"}
    answers = []
    for content in contents:
        found = [reason for word, reason in reasons.items() if word in str(content)]
        answers.append(Refusal(found[0], f"cannot: {content}") if found else Answer(f"{content}", "stop", 1, 1))
    return answers


def raising(row):
    """Fail at one row, and say what is in it."""
    if "raise" in (row.get("text") or ""):
        raise ValueError(row["text"])
    return row


@pytest.mark.parametrize("row", shapes(), ids=lambda row: row["id"])
def test_no_row_is_in_the_log(row, tmp_path):
    """Whatever it fails of: its id and its reason are told, a message only where that cannot quote it."""
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    asked = {"messages": "${turns}"} if "turns" in row else {"messages": [{"role": "user", "content": "${text}"}]}
    if "unfit" in (row.get("text") or ""):
        asked |= {"output_schema": {"type": "object"}}
    if "budget" in row:
        asked |= {"max_tokens": "${budget}"}
    if "raise" in (row.get("text") or ""):
        asked |= {"preprocess": f"{__name__}:raising"}
    asked |= {"id_column": "id", "max_failed_fraction": 1}
    spec = BatchSpec(source=f"{tmp_path}/in.jsonl", output=f"{tmp_path}/out", **asked)
    tally = Tally()
    attempt(spec, ask=quoting, tally=tally)
    line = progress_line(1, tally.progress(1))

    (failed,) = tally.failed_rows
    assert (failed.row_id, failed.reason, tally.failures) == (row["id"], row["id"], {row["id"]: 1})
    assert "PRIVATE" not in line
    assert "PRIVATE" not in failed.message


def test_a_message_of_this_packages_own_is_told():
    """It names columns and numbers; the task's log has no more than before."""
    line, record = told(counted([("a", "null_value", "column 'text' is null"), ("b", "invalid_request", "text is …")]))
    assert [(row.row_id, row.reason, row.message) for row in record.failed_rows] == [
        ("a", "null_value", "column 'text' is null"),
        ("b", "invalid_request", ""),
    ]
    assert said(f"{line}\n") == {7: "2 rows, 2 failed, 0.2 rows/s, 0 tokens/s"}


@pytest.mark.parametrize("character", ["x", "é", "😀", "\x00", '"', "\u2028"], ids=ascii)
def test_a_million_failures_are_a_line_of_bounded_length(character):
    """Of the first five rows, however long their ids are; so that one process prints it in one go."""
    failed = [(f"{number}{character * 10_000}", "null_value", character * 10_000) for number in range(256)]
    block = counted(failed)
    assert sum(map(len, block["failed_rows"])) < 5_000
    line, record = told(*({**block, "block": str(number)} for number in range(3907)))

    assert record.failed == record.rows == 3907 * 256
    assert [row.row_id[0] for row in record.failed_rows] == list("01234")
    assert all(row.row_id.endswith("…") and row.message.endswith("…") for row in record.failed_rows)
    assert len(line.encode()) < 4096


def test_secrets_are_hidden_before_anything_is_cut(monkeypatch):
    """Of a secret that a cut goes through, no beginning is left."""
    monkeypatch.setattr(surroundings, "_entered", Surroundings(storage={"s3": {"secret": "s3cr3t-of-the-storage"}}))
    line, record = told(counted([(f"{'x' * 190}s3cr3t-of-the-storage", "timeout", "s3cr3t-of-the-storage")]))
    assert "s3c" not in line
    assert (record.failed_rows[0].row_id, record.failed_rows[0].message) == (f"{'x' * 190}***", "***")


def test_rows_of_earlier_blocks_stay():
    """The first ones of the attempt, in the order in which blocks ended."""
    _, record = told(*(counted([(f"{name}", "timeout", "late")] * 3, name) for name in "abc"))
    assert [row.row_id for row in record.failed_rows] == list("aaabb")


def test_an_older_jobs_record_is_read():
    """It has no failed rows; one with more than a job tells is none of a job's."""
    assert progress_in('raylm - progress: {"at": 1.0, "rows": 3, "failures": {"timeout": 1}}\n')[0].failed_rows == ()
    with pytest.raises(SpecError, match="failed_rows"):
        Progress(failed_rows=[{"row_id": "a", "reason": "timeout"}] * 6)
