"""The wait without a worker: what a trigger says, when it ends, and what many of them cost."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.polling import FAILED, SUCCEEDED, JobInfo, Unreachable
from airflow_provider_raylm.triggers import raylm
from airflow_provider_raylm.triggers.raylm import RayJobTrigger
from airflow_provider_raylm.wire import error_line, result_line, said_line

RUNNING = JobInfo("RUNNING")
LINES = [said_line("one"), "noise", said_line("two")]


class Jobs:
    """A cluster with one job, which ends after some looks; an exception among the looks is raised."""

    dashboard_url = "http://ray:8265"

    def __init__(self, *looks, last):
        self.looks = list(looks)
        self.last = last
        self.stopped = []
        self.opened = self.looked = 0

    def get(self, submission_id):
        self.looked += 1
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return look

    def logs(self, submission_id, offset=0):
        return "\n".join([*LINES, self.last, ""])[offset:]

    def stop(self, submission_id):
        self.stopped.append(submission_id)

    def close(self):
        self.opened -= 1


@pytest.fixture
def connect(monkeypatch):
    def connect(jobs):
        async def aget_conn(hook):
            jobs.opened += 1
            return jobs

        monkeypatch.setattr(RayLMHook, "aget_conn", aget_conn)
        return jobs

    return connect


def trigger(deferred_at=None, deadline=None):
    return RayJobTrigger("raylm_default", "job-1", 0.01, deadline, deferred_at or time.time())


async def fired(one):
    return [event.payload async for event in one.run()]


@pytest.fixture
def said(monkeypatch):
    """The lines that triggers log."""
    lines = []
    log = SimpleNamespace(info=lambda form, line: lines.append(form % line))
    monkeypatch.setattr(RayJobTrigger, "log", log)
    return lines


def test_it_fires_with_the_result(connect, said):
    """Once, after an outage, with the job's lines in the log and the connection closed."""
    jobs = connect(Jobs(RUNNING, Unreachable("no answer"), RUNNING, JobInfo(SUCCEEDED), last=result_line({"a": 1})))

    (event,) = asyncio.run(fired(trigger()))
    assert event == {"result": {"a": 1}, "dashboard_url": "http://ray:8265", "submission_id": "job-1"}
    assert said == ["one", "two"]
    assert (jobs.looked, jobs.opened) == (4, 0)


def test_an_error_is_fired_too(connect):
    """As the job reported it."""
    connect(Jobs(JobInfo(FAILED), last=error_line(EngineError("gone"))))

    assert asyncio.run(fired(trigger())) == [{"error": {"type": "EngineError", "message": "gone"}}]


def test_the_deadline_stops_the_job(connect):
    """It travels with the trigger."""
    jobs = connect(Jobs(RUNNING, last=""))
    (event,) = asyncio.run(fired(trigger(deadline=time.time() + 0.1)))

    assert "not done in time" in event["error"]["message"]
    assert jobs.stopped == ["job-1"]


@pytest.mark.parametrize(
    ("states", "stopped"),
    [({"label": "failed"}, True), ({"label": None}, True), ({}, True), ({"label": "deferred"}, False)],
)
def test_a_user_stops_the_job_and_a_restart_does_not(connect, monkeypatch, states, stopped):
    """Airflow only cancels for the one, and calls on_kill for the other: and when another triggerer has taken over."""
    jobs = connect(Jobs(RUNNING, last=""))
    task = ("nightly", -1, ["label"])

    def get_task_states(*asked, run_ids):
        assert (asked, run_ids) == (task, ["run"])
        return {"run": states}

    monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", staticmethod(get_task_states))

    async def scenario():
        one = trigger()
        one.task_instance = SimpleNamespace(dag_id="nightly", run_id="run", task_id="label", map_index=-1)
        waiting = asyncio.create_task(fired(one))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert jobs.stopped == []
        await one.on_kill()

    asyncio.run(scenario())
    assert (jobs.stopped, jobs.opened) == (["job-1"] if stopped else [], 0)


def test_one_that_takes_over_does_not_repeat_lines(connect, said):
    """Another triggerer's trigger has said them."""
    connect(Jobs(RUNNING, JobInfo(SUCCEEDED), last=result_line({})))
    asyncio.run(fired(trigger(deferred_at=time.time() - 2 * raylm.TAKEN_OVER_AFTER_S)))

    assert said == []


def test_it_can_be_made_anew(connect):
    """From what Airflow stores."""
    path, arguments = trigger(deferred_at=5.0, deadline=7.0).serialize()

    assert path == "airflow_provider_raylm.triggers.raylm.RayJobTrigger"
    assert RayJobTrigger(**arguments).serialize() == (path, arguments)


def test_many_look_no_more_often_than_few(connect, monkeypatch):
    """Two hundred share one connection, and the event loop is not held up."""
    monkeypatch.setattr(raylm, "LOOKS_PER_S", 100.0)
    jobs = connect(Jobs(RUNNING, last=""))
    late = []

    async def scenario():
        waiting = [asyncio.create_task(fired(trigger())) for _ in range(200)]
        for _ in range(100):
            begun = time.monotonic()
            await asyncio.sleep(0.03)
            late.append(time.monotonic() - begun - 0.03)
        assert jobs.opened == 1
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(scenario())
    # Each once at the start, and then a hundred looks a second, not the 20,000 of two hundred loops of 10 ms.
    assert 200 + 100 <= jobs.looked <= 200 + 100 * 4
    assert sorted(late)[90] < 0.1
    assert jobs.opened == 0
