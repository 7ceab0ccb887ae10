"""The commands on a real engine: what a preview shows is what the task would write, and an estimate counts the rows."""

import json
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from airflow_provider_raylm.cli.main import main
from tests.browser import until
from tests.chaos.scripted_engine import scripted
from tests.integration.conftest import MAX_TOKENS, ROWS
from tests.integration.test_engine import engines

DAG = """
from airflow.sdk import DAG
from airflow_provider_raylm.authoring import shared_engine

with DAG("d", schedule=None), shared_engine("shared", model={model!r}, gpus_per_worker=0, num_cpus=0.5) as engine:
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
def raylm(cluster, engine, model, source, airflow_db, monkeypatch, tmp_path, capsys):
    """Run a command; return its exit status and what it printed."""
    written = textwrap.dedent(DAG).format(
        model=model, source=source, output=str(tmp_path / "out"), max_tokens=MAX_TOKENS
    )
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "dag.py").write_text(written)
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", json.dumps(cluster.connection()))

    def command(verb, *options):
        about = {"validate": [str(folder)], "engines": []}.get(verb, ["d", "label", "--dags-folder", str(folder)])
        return [verb, *about, *options]

    def run(*arguments):
        status = main(command(*arguments))
        out, err = capsys.readouterr()
        # For whoever reads why a test failed.
        print(err, file=sys.stderr)
        return status, out

    run.command = command
    return run


@pytest.fixture
def elsewhere(cluster, monkeypatch):
    """Have engines that are deployed be scripted ones: they come and go as vLLM's do, in seconds."""
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_DEFAULT", json.dumps(scripted(cluster).connection()))


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


def test_a_folder_is_validated_against_its_storage(raylm):
    """The files that a task would read are looked at from the cluster."""
    status, out = raylm("validate", "--storage")

    assert status == 0
    assert re.search(rf"^ok +d\.label: 3 files, {ROWS} rows$", out, re.MULTILINE), out


def test_a_temporary_engine_lives_as_long_as_the_command(raylm, elsewhere, cluster):
    """It answers, and is gone when the command returns; the one that runs stays."""
    before = engines(cluster)
    status, out = raylm("preview", "--rows", "3", "--engine", "temporary")

    assert status == 0
    assert "3 answered, 0 failed" in out
    assert engines(cluster) == before


def test_an_interrupted_command_leaves_no_engine(raylm, elsewhere, cluster, tmp_path):
    """Ctrl-C while a temporary engine starts."""
    before, said = set(engines(cluster)), tmp_path / "stderr"
    running = subprocess.Popen(
        [sys.executable, "-m", "airflow_provider_raylm.cli", *raylm.command("preview", "--engine", "temporary")],
        stderr=said.open("w"),
        stdout=subprocess.DEVNULL,
        # A shell's background job ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        (application,) = until(lambda: set(engines(cluster)) - before)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130
    finally:
        running.kill()
    assert f"tearing {application} down" in said.read_text()
    assert set(engines(cluster)) == before
