"""What keeps an engine for a task: from the task's first look until its manifest is written."""

import threading
from contextlib import contextmanager

import pytest

from airflow_provider_raylm.cluster import __main__ as job
from airflow_provider_raylm.cluster.batch import heartbeat, pipeline
from airflow_provider_raylm.cluster.engine import leases, status
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchSpec
from airflow_provider_raylm.wire import progress_in, said
from tests.scripted import REF

OUTPUT = "/tmp/out"
SPEC = BatchSpec(source="/tmp/in", prompt="${text}", output=OUTPUT)


@pytest.fixture
def events(monkeypatch):
    """What happens to the engine's lease, in order; the heart beats fast."""
    events = []
    monkeypatch.setattr(heartbeat, "HEARTBEAT_PERIOD_S", 0.01)
    monkeypatch.setattr(status, "trouble", lambda application: None)
    monkeypatch.setattr(leases, "renew", lambda application, output: events.append(("renew", application, output)))
    monkeypatch.setattr(leases, "release", lambda application, output: events.append(("release", application, output)))
    monkeypatch.setattr(leases, "record", lambda application, report: events.append("record"))
    monkeypatch.setattr(pipeline, "held", lambda name, on_wait: _held(events, on_wait))
    monkeypatch.setattr(pipeline, "answer_source", lambda *args: _while_it_beats(events, "answered"))
    return events


@contextmanager
def _held(events, on_wait):
    """Another attempt holds the output for some beats."""
    on_wait(0.0)
    _while_it_beats(events, "locked")
    yield


def _while_it_beats(events, mark):
    """Go on when the lease has been renewed some times more."""
    before = len(events)
    for _ in range(500):
        if len(events) >= before + 3:
            break
        threading.Event().wait(0.01)
    else:
        raise AssertionError(f"no renewal until {mark}")
    events.append(mark)


def test_the_lease_is_renewed_from_the_first_look_to_the_report(events, monkeypatch):
    """Also while another attempt is waited for, while a lent engine is asked for its size, and while it is planned."""
    monkeypatch.setattr(pipeline, "with_vector_size", lambda spec, ref, say: events.append("size") or ref)
    pipeline.infer(SPEC, REF, lambda line: None)

    renewal, end = ("renew", REF.application, OUTPUT), ("release", REF.application, OUTPUT)
    assert events[0] == renewal
    assert [event for event in events if event != renewal] == ["locked", "size", "answered", "record", end]
    assert not {"raylm-heartbeat", "raylm-progress"} & {thread.name for thread in threading.enumerate()}


def test_a_renewal_that_fails_is_said_once_and_tried_again(events, monkeypatch):
    """Whatever it fails with; and the task continues."""
    failures = [leases.SilentLease("silent"), *[leases.SilentLease("silent")] * 3, OSError("no room")]

    def renew(application, output):
        if failures:
            raise failures.pop(0)
        events.append("renewed")

    monkeypatch.setattr(leases, "renew", renew)
    said = []
    pipeline.infer(SPEC, REF, said.append)

    trying = "renewing the engine's lease fails, and is tried every 0.01 s"
    # What else is said comes from another thread, at any moment.
    assert [line for line in said if line.startswith("renewing")] == [
        f"{trying}: SilentLease: silent",
        f"{trying}: OSError: no room",
        "renewing the engine's lease succeeds again",
    ]


def test_a_look_that_hangs_does_not_hold_up_the_renewals(events, monkeypatch):
    """Such as for Serve's controller."""
    over = threading.Event()
    monkeypatch.setattr(status, "trouble", lambda application: over.wait(20))
    monkeypatch.setattr(leases, "LEASE_CALL_TIMEOUT_S", 0.1)
    pipeline.infer(SPEC, REF, lambda line: None)
    over.set()

    assert events[-2:] == ["record", ("release", REF.application, OUTPUT)]


def test_a_task_that_fails_is_released(events, monkeypatch):
    def answer_source(*args):
        raise BatchError("no rows")

    monkeypatch.setattr(pipeline, "answer_source", answer_source)
    with pytest.raises(BatchError, match="^no rows$"):
        pipeline.infer(SPEC, REF, lambda line: None)
    assert events[-1] == ("release", REF.application, OUTPUT)


def test_progress_is_told_at_every_beat_and_said_now_and_then(events, monkeypatch, capsys):
    """Beginning with nothing done of a known number of rows; the job prints records that its followers read."""
    monkeypatch.setattr(heartbeat, "SAY_PERIOD_S", 0.1)

    def answer_source(spec, ref, answers, say, tally):
        tally.total = 100
        _while_it_beats(events, "begun")
        tally.written, tally.failures["timeout"] = 40, 2
        for _ in range(20):
            _while_it_beats(events, "answered")

    monkeypatch.setattr(pipeline, "answer_source", answer_source)
    pipeline.infer(SPEC, REF, lambda line: None, tell=job.tell)
    log = capsys.readouterr().out
    records, lines = progress_in(log), list(said(log).values())

    assert (records[0].rows, records[0].total) == (0, 100)
    assert (records[-1].rows, records[-1].failures) == (42, {"timeout": 2})
    assert records[0].at > 1e9
    assert 0 < len(lines) < len(records) / 2
    assert all(line.startswith("42 of 100 rows, 2 failed, ") for line in lines)

    before = []
    pipeline.infer(SPEC, REF, before.append)
    assert [line for line in before if "42 of 100 rows, 2 failed" in line]
