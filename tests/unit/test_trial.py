"""How a preview's job asks an engine that is up: by its handle, as a task at work, and without recovery."""

import json
from contextlib import contextmanager

import pytest

from airflow_provider_raylm.cluster.batch import trial
from airflow_provider_raylm.cluster.batch.asking import Engine
from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.batch.recovery import EngineFailure
from airflow_provider_raylm.errors import BatchError, EngineError, SpecError
from airflow_provider_raylm.sealing import new_pad, unseal
from airflow_provider_raylm.specs import BatchSpec
from tests.scripted import REF


class Handle:
    """The engine's, which answers in capitals and fails at a row."""

    def __init__(self, serves, ref, task, timeout, caller=None):
        self.task = task
        events.append(("handle", serves, timeout))

    async def arrive(self, timeout):
        events.append(("well", timeout))
        return Engine(frozenset({"a", "b"}), 8, 1_000, frozenset({"s3://other"}))

    async def ask(self, question, requests, *, alone, near):
        assert not alone
        for number, request in enumerate(requests):
            if request.content == "dies":
                raise EngineFailure("the replica is gone")
            refused = request.content == "bad"
            yield [
                (number, Refusal("invalid_request", "no") if refused else Answer(request.content.upper(), "stop", 2, 3))
            ]


events = []


@pytest.fixture
def spec(tmp_path, monkeypatch):
    events.clear()

    @contextmanager
    def heartbeat(application, output, tally, say, tell):
        events.append(("begin", application, output))
        yield
        events.append(("end", application))

    monkeypatch.setattr(trial, "heartbeat", heartbeat)
    monkeypatch.setattr(trial, "Handle", Handle)
    monkeypatch.setattr(trial.serve, "get_deployment_handle", lambda deployment, application: deployment)
    monkeypatch.setattr(trial.status, "wait_until_running", lambda ref, timeout, say: events.append(("up", timeout)))
    (tmp_path / "in.txt").write_text("one\nbad\nthree\nfour\n")
    return BatchSpec(source=str(tmp_path / "in.txt"), prompt="${text}", output=str(tmp_path / "out"), engine_timeout=7)


def test_rows_are_asked_as_a_task_at_work(spec, tmp_path):
    """The lease is held from the plan to the last answer; counts are in the open, rows are sealed."""
    pad = new_pad()
    report = trial.look(spec, REF, 3, False, pad, lambda line: None)

    name = events[0][2]
    assert name.startswith("preview-")
    assert events == [
        ("begin", REF.application, name),
        ("up", 7.0),
        ("handle", "engine", None),
        ("well", 7.0),
        ("end", REF.application),
    ]
    assert [one.reason for one in report.counts] == [None, "invalid_request", None]
    assert (report.plan.rows, report.capacity, report.replicas) == (3, 8, 2)
    rows = json.loads(unseal(report.sealed, pad))
    assert [row["answer"] for row in rows] == [{"response": "ONE"}, {}, {"response": "THREE"}]
    # Sealed text is random, and may hold any short word.
    shown = report.model_copy(update={"sealed": ""}).model_dump_json()
    assert not [word for word in ("ONE", "three", "bad") if word in shown]
    assert not (tmp_path / "out").exists()


def test_a_sample_reports_counts_alone(spec):
    """Nobody asked for its rows, and all of the source is counted."""
    report = trial.look(spec, REF, 2, True, None, lambda line: None)

    assert (report.plan.rows, len(report.counts), report.sealed) == (4, 2, "")


def test_an_engine_that_fails_ends_it(spec, tmp_path):
    """Who looks on tries again; other tasks' rows are not held back for it."""
    (tmp_path / "in.txt").write_text("dies\n")
    with pytest.raises(EngineError, match=r"failed while it had rows of this preview: the replica is gone\. Try again"):
        trial.look(spec, REF, 1, False, None, lambda line: None)


def test_what_cannot_be_asked(spec):
    """Is refused before the source is looked at."""
    for rows in (0, 101):
        with pytest.raises(SpecError, match="between 1 and 100"):
            trial.look(spec, REF, rows, False, None, lambda line: None)
    with pytest.raises(BatchError, match="raylm preview"):
        trial.look(spec, REF, 1, False, b"", lambda line: None)
    with pytest.raises(SpecError, match="task='embed'"):
        trial.look(spec, REF.model_copy(update={"task": "embed"}), 1, False, None, lambda line: None)
    assert events == []
