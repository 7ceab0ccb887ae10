"""The commands on a real engine: what a preview shows is what the task would write, and an estimate counts the rows."""

import json
import re
import textwrap

import pytest

from airflow_provider_raylm.cli.main import main
from tests.integration.conftest import MAX_TOKENS, ROWS

DAG = """
from airflow.sdk import DAG
from airflow_provider_raylm.authoring import shared_engine

with DAG("d", schedule=None), shared_engine("shared", model={model!r}) as engine:
    engine.infer(
        "label",
        source={source!r},
        prompt="Say: ${{text}}",
        temperature=0,
        max_tokens={max_tokens},
        output={output!r},
    )
"""


@pytest.fixture
def raylm(cluster, engine, source, airflow_db, monkeypatch, tmp_path, capsys):
    """Run a command; return its exit status and what it printed."""
    written = textwrap.dedent(DAG).format(
        model=engine["model"], source=source, output=str(tmp_path / "out"), max_tokens=MAX_TOKENS
    )
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "dag.py").write_text(written)
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", json.dumps(cluster.connection()))

    def run(*arguments):
        task = ["d", "label", "--dags-folder", str(folder)] if arguments[0] in ("preview", "estimate") else []
        status = main([arguments[0], *task, *arguments[1:]])
        return status, capsys.readouterr().out

    return run


def test_a_preview_shows_what_the_task_would_write(raylm, cluster, engine, offline, texts, tmp_path):
    """Of its first rows, on the DAG's own engine; nothing is written, and no row is in the job's log."""
    status, out = raylm("preview", "--rows", "3", "--full")

    shown = re.sub(r"\s+", " ", out)
    assert status == 0
    for text, answer in zip(texts[:3], offline["prompts"], strict=False):
        assert re.sub(r"\s+", " ", f"asked: Say: {text}").strip() in shown
        assert re.sub(r"[^\w]+", "", answer) in re.sub(r"[^\w]+", "", out)
    assert "3 rows asked of tiny: 3 answered, 0 failed" in out
    assert not (tmp_path / "out").exists()
    for log in cluster.logs.glob("job-driver-raylm-preview-*"):
        assert texts[0] not in log.read_text()


def test_an_estimate_counts_all_rows(raylm):
    """From a sample, with a range."""
    status, out = raylm("estimate", "--sample", "20")

    assert status == 0
    assert re.search(rf"\b{ROWS}\b", out), out


def test_engines_are_listed(raylm, engine):
    """As Serve shows them."""
    status, out = raylm("engines")

    assert status == 0
    assert engine["application"] in out
    assert "RUNNING" in out
