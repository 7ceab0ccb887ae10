"""What `raylm quarantine` shows of failed rows that a task wrote."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_provider_raylm.cli.main import main
from airflow_provider_raylm.specs import BatchSpec
from tests.scripted import attempt


def task(folder, **fields):
    """Run a task of which two rows of five fail, and return its spec."""
    source = folder / "in.txt"
    source.write_text("good\nbad one\nfine\nbad two\n \n")
    fields = {
        "source": str(source),
        "prompt": "${text}",
        "output": str(folder / "out"),
        "max_failed_fraction": 1,
        **fields,
    }
    spec = BatchSpec(**fields)
    assert attempt(spec).rows_quarantined == 3
    return spec


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("below", ["", "/_quarantine"])
def test_failed_rows_are_shown_by_reason(tmp_path, capsys, output_format, below):
    """With so many examples as are asked for; the output and its quarantine are both a way to them."""
    spec = task(tmp_path, output_format=output_format)

    assert main(["quarantine", spec.output + below, "--examples", "1"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"3 failed rows in {spec.output}/_quarantine"
    assert [line.split() for line in lines[3:5]] == [["invalid_request", "2"], ["empty_prompt", "1"]]
    assert "invalid_request, row 00000-000000001: refused" in lines
    assert "    text: bad one" in lines
    assert "bad two" not in out
    assert f'source="{spec.output}/_quarantine"' in lines[-1]
    assert "clearing it asks nothing" in lines[-1]


def test_a_task_that_is_not_complete_is_cleared(tmp_path, capsys):
    """Its retry asks failed rows again."""
    spec = task(tmp_path)
    manifest = tmp_path / "out" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"writing"'))

    assert main(["quarantine", spec.output]) == 0
    assert "let it retry" in capsys.readouterr().out


def test_a_quarantine_of_ones_own(tmp_path, capsys):
    """The manifest tells where it is; by itself it does not tell whether the task is complete."""
    spec = task(tmp_path, quarantine=str(tmp_path / "failed"))

    assert main(["quarantine", spec.output, "--examples", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"3 failed rows in {tmp_path}/failed"
    assert main(["quarantine", str(tmp_path / "failed")]) == 0
    assert "If the task is not complete" in capsys.readouterr().out


def test_no_failed_rows(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("good\n")
    attempt(BatchSpec(source=str(tmp_path / "in.txt"), prompt="${text}", output=str(tmp_path / "out")))

    assert main(["quarantine", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"no failed rows in {tmp_path}/out/_quarantine\n"


def test_rows_of_json_lines_are_shown_as_they_are_written(tmp_path, capsys):
    """However long: what was longer than the model's context is a failed row; and a text that looks like a date."""
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"day": "2026-01-01", "text": f"bad {'x' * 3_000_000}"}) + "\n")
    spec = BatchSpec(
        source=str(source),
        prompt="${text}",
        output=str(tmp_path / "out"),
        output_format="jsonl",
        max_failed_fraction=1,
    )
    assert attempt(spec).rows_quarantined == 1

    assert main(["quarantine", spec.output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "    day: 2026-01-01" in lines
    assert any(line.startswith("    text: bad xxx") for line in lines)


@pytest.mark.parametrize("place", ["", "in.txt"])
def test_what_is_neither_an_output_nor_a_quarantine_is_not_said_to_have_no_failed_rows(tmp_path, capsys, place):
    """Such as the folder of several tasks' outputs: there are failed rows below it."""
    task(tmp_path)
    assert main(["quarantine", str(tmp_path / place)]) == 1
    assert "that a task has written. Name a task's output" in capsys.readouterr().err


def test_a_place_without_a_quarantine(tmp_path, capsys):
    """What is there instead is told."""
    spec = task(tmp_path)
    assert main(["quarantine", str(tmp_path / "nothing")]) == 1
    assert "There is nothing at" in capsys.readouterr().err
    (tmp_path / "out" / "_manifest.json").unlink()
    for part in (tmp_path / "out" / "_quarantine").iterdir():
        part.unlink()
    assert main(["quarantine", spec.output]) == 1
    assert "has answers, not failed rows" in capsys.readouterr().err


def test_values_that_python_does_not_know_are_shown_by_their_type(tmp_path, capsys):
    """A column that nobody needed passes by whatever is in it."""
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    rows = {"raw": bad, "raylm_reason": ["timeout"], "raylm_message": ["\x1b[2J late"], "raylm_row_id": ["7\nrow 8"]}
    pq.write_table(pa.table(rows), tmp_path / "part-00000-000000000-1.parquet")

    assert main(["quarantine", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "timeout, row 7 row 8: \ufffd[2J late" in lines
    assert "    raw: (string)" in lines


def test_credentials_come_from_airflows_connections(tmp_path, monkeypatch):
    """As a task's do, and are forgotten afterwards."""
    from fsspec.config import conf

    from airflow_provider_raylm.cli import quarantine

    monkeypatch.setenv("AIRFLOW_CONN_STORE", "aws://key:c0mm4nd-s3cr3t@")
    seen = []
    monkeypatch.setattr(quarantine, "_found", lambda path: seen.append(dict(conf["s3"])) or (None, path, []))

    assert main(["quarantine", "s3://out", "--storage-conn", "store"]) == 0
    assert seen == [{"key": "key", "secret": "c0mm4nd-s3cr3t"}]
    assert "s3" not in conf or conf["s3"].get("secret") != "c0mm4nd-s3cr3t"
