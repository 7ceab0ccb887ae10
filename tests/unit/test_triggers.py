"""The wait without a worker: what a trigger says, when it ends, and what many of them cost."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
from airflow.triggers.base import BaseTrigger

from airflow_provider_raylm import following
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.polling import FAILED, SUCCEEDED, JobInfo, Refused, Unreachable
from airflow_provider_raylm.specs import EngineRef, Progress
from airflow_provider_raylm.triggers import connections, raylm
from airflow_provider_raylm.triggers.raylm import EngineTrigger, RayJobTrigger
from airflow_provider_raylm.wire import error_line, progress_line, result_line, said_line

RUNNING = JobInfo("RUNNING")
LINES = [said_line(1, "one"), "noise", said_line(2, "two")]
TOLD_TO_STOP = pytest.mark.skipif(
    not hasattr(BaseTrigger, "on_kill"), reason="Airflow tells a trigger from 3.3 on that a user has stopped its task"
)


class Jobs:
    """A cluster with one job, which ends after some looks; an exception among the looks is raised."""

    dashboard_url = "http://ray:8265"

    def __init__(self, *looks, last):
        self.looks = list(looks)
        self.last = last
        self.stopped = []
        self.opened = self.opens = self.looked = 0

    def get(self, submission_id):
        self.looked += 1
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return look

    def logs(self, submission_id, lines=None):
        return "".join(f"{line}\n" for line in [*LINES, self.last][-(lines or 0) :])

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


async def ended(tasks):
    for one in tasks:
        one.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def said(monkeypatch):
    """The lines that triggers log."""
    lines = []
    log = SimpleNamespace(info=lambda form, line: lines.append(form % line), warning=lambda *_: None)
    monkeypatch.setattr(RayJobTrigger, "log", log)
    return lines


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Ask a silent cluster again at once."""
    monkeypatch.setattr(connections, "SILENT_FOR_S", (0.001, 0.01))


def test_it_fires_with_the_result(connect, said):
    """Once, after an outage, with the job's lines in the log and the connection closed."""
    jobs = connect(Jobs(RUNNING, Unreachable("no answer"), RUNNING, JobInfo(SUCCEEDED), last=result_line({"a": 1})))

    (event,) = asyncio.run(fired(trigger()))
    assert event == {"result": {"a": 1}, "dashboard_url": "http://ray:8265", "submission_id": "job-1"}
    assert said == ["one", "two"]
    assert (jobs.looked, jobs.opened) == (4, 0)


@pytest.mark.parametrize("task", [None, SimpleNamespace(dag_id="d", task_id="t")])
def test_it_measures_the_progress_of_its_task(connect, said, monkeypatch, task):
    """Where it knows which one that is: in `dag.test()` it does not."""
    measured = []
    monkeypatch.setattr(raylm, "measure_progress", lambda ti, progress: measured.append((ti, progress)))
    records = [Progress(at=10, seconds=10, rows=5, total=10), Progress(at=20, seconds=20, rows=8, total=10)]
    monkeypatch.setattr(Jobs, "logs", lambda *_: "".join(f"{progress_line(3, one)}\n" for one in records))
    jobs = connect(Jobs(RUNNING, Unreachable("no more"), last=""))
    one = trigger(deadline=time.time() + 0.3)
    one.task_instance = task
    asyncio.run(fired(one))

    assert measured == ([] if task is None else [(task, records[1])])
    assert said == ["8 of 10 rows, 0 failed, 0.4 rows/s, 0 tokens/s, 5 s left"]
    assert jobs.opened == 0


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


def test_a_restart_does_not_stop_the_job(connect):
    """Airflow cancels the trigger then; before 3.3 it does no more when a user marks or clears the task."""
    jobs = connect(Jobs(RUNNING, last=""))

    async def scenario():
        waiting = asyncio.create_task(fired(trigger()))
        await asyncio.sleep(0.05)
        await ended([waiting])

    asyncio.run(scenario())
    assert (jobs.stopped, jobs.opened) == ([], 0)


@TOLD_TO_STOP
@pytest.mark.parametrize(
    ("states", "stopped"),
    [({"label": "failed"}, True), ({"label": None}, True), ({}, True), ({"label": "deferred"}, False)],
)
def test_a_user_stops_the_job(connect, monkeypatch, states, stopped):
    """Airflow calls on_kill then: and when another triggerer has taken over, whose job it is."""
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
        await ended([waiting])
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
    monkeypatch.setattr(connections, "LOOKS_PER_S", 100.0)
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


class Dead(Jobs):
    """Does not answer, and takes its time for it."""

    def get(self, submission_id):
        self.looked += 1
        time.sleep(0.5)
        raise Unreachable("no answer")


@pytest.fixture
def clusters(monkeypatch):
    """Clusters by connection, each opened anew when it is asked for."""
    found = {}

    async def aget_conn(hook):
        jobs = found[hook.raylm_conn_id]
        jobs.opened += 1
        jobs.opens += 1
        return jobs

    monkeypatch.setattr(RayLMHook, "aget_conn", aget_conn)
    return found


def on(conn_id, submission_id="job-1"):
    return RayJobTrigger(conn_id, submission_id, 0.01, None, time.time())


def test_a_silent_cluster_delays_no_other(clusters, monkeypatch):
    """However many wait for it; and few of them ask it."""
    monkeypatch.setattr(connections, "SILENT_FOR_S", (1.0, 30.0))
    clusters["dead"] = Dead(RUNNING, last="")
    clusters["alive"] = Jobs(RUNNING, JobInfo(SUCCEEDED), last=result_line({}))

    async def scenario():
        waiting = [asyncio.create_task(fired(on("dead", f"job-{number}"))) for number in range(50)]
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await fired(on("alive"))
        seconds = time.monotonic() - begun
        await asyncio.sleep(1.5)
        await ended(waiting)
        return seconds

    assert asyncio.run(scenario()) < 0.4
    assert clusters["dead"].looked <= 2 * connections.THREADS


def refuse_stops(jobs, *errors):
    """Have the first calls of ``stop`` raise these, in order."""
    left = list(errors)

    def stop(submission_id):
        if left:
            raise left.pop(0)
        jobs.stopped.append(submission_id)

    jobs.stop = stop


@TOLD_TO_STOP
def test_a_stop_waits_for_no_look(clusters, monkeypatch):
    """And bears silence, too."""
    monkeypatch.setattr(following, "RETRY_PERIOD_S", 0.01)
    dead = clusters["dead"] = Dead(RUNNING, last="")
    refuse_stops(dead, Unreachable("no answer"))

    async def scenario():
        waiting = [asyncio.create_task(fired(on("dead"))) for _ in range(50)]
        await asyncio.sleep(0.1)
        one = on("dead", "job-2")
        one._is_deferred = lambda: False
        begun = time.monotonic()
        await one.on_kill()
        seconds = time.monotonic() - begun
        await ended(waiting)
        return seconds

    assert asyncio.run(scenario()) < 0.4
    assert dead.stopped == ["job-2"]


def test_a_token_that_has_changed_is_read_again(clusters, said):
    """The task was deferred with the old one."""
    jobs = clusters["c"] = Jobs(RUNNING, Refused("wrong token"), Refused("wrong token"), JobInfo(SUCCEEDED), last="")
    jobs.last = result_line({"a": 1})

    (event,) = asyncio.run(fired(on("c")))
    assert event["result"] == {"a": 1}
    assert jobs.opens == 3


@TOLD_TO_STOP
def test_a_token_that_has_changed_is_read_again_for_a_stop(clusters, said):
    """The job would go on."""
    jobs = clusters["c"] = Jobs(RUNNING, last="")
    refuse_stops(jobs, Refused("wrong token"), Refused("wrong token"))
    one = on("c")
    one._is_deferred = lambda: False

    asyncio.run(one.on_kill())
    assert (jobs.stopped, jobs.opens) == (["job-1"], 3)


@pytest.mark.parametrize("refused", [2, 10**6])
def test_a_token_that_has_changed_is_read_again_for_an_engine(clusters, monkeypatch, refused):
    """For as long as for a job."""
    monkeypatch.setattr(raylm, "OUTAGE_LIMIT_S", 0.2)
    jobs = clusters["c"] = Jobs(RUNNING, last="")
    labels = {"installation": "i", "dag_id": "d", "run_id": "r", "engine": "e"}
    ref = EngineRef(application="raylm-e", deployment="engine", model="m", fingerprint="f", labels=labels, lease={})
    looks = iter(range(refused))

    def running_engines():
        if next(looks, None) is not None:
            raise Refused("wrong token")
        return (ref,)

    jobs.running_engines = running_engines
    (event,) = asyncio.run(fired(EngineTrigger("c", {"installation": "i", "engine": "e"}, 0.01)))

    if refused == 2:
        assert event == {"engine": ref.model_dump(mode="json")}
        assert jobs.opens == 3
    else:
        assert event == {"error": {"type": "ClusterError", "message": "wrong token"}}


def test_a_token_that_stays_wrong_ends_the_task(clusters, said, monkeypatch):
    """After the time for which silence would be borne, too."""
    monkeypatch.setattr(raylm, "OUTAGE_LIMIT_S", 0.1)
    clusters["c"] = Jobs(Refused("wrong token"), last="")

    assert asyncio.run(fired(on("c"))) == [{"error": {"type": "ClusterError", "message": "wrong token"}}]


def test_a_connection_is_read_again_now_and_then(clusters, monkeypatch):
    """It may have been edited; the earlier clients are closed."""
    monkeypatch.setattr(connections, "CLIENT_KEPT_S", 0.05)
    monkeypatch.setattr(connections, "CLOSED_AFTER_S", 0.05)
    jobs = clusters["c"] = Jobs(RUNNING, last="")

    async def scenario():
        waiting = asyncio.create_task(fired(on("c")))
        await asyncio.sleep(0.5)
        await ended([waiting])
        await asyncio.sleep(0.2)

    asyncio.run(scenario())
    assert jobs.opens > 2
    assert jobs.opened == 0


def test_a_connection_that_cannot_be_read_again_ends_no_task(clusters, monkeypatch, said):
    """Airflow's own API may be away for a moment; who has no client yet is told."""
    monkeypatch.setattr(connections, "CLIENT_KEPT_S", 0.02)
    jobs = clusters["c"] = Jobs(*[RUNNING] * 10, JobInfo(SUCCEEDED), last=result_line({"a": 1}))
    opened = RayLMHook.aget_conn

    async def aget_conn(hook):
        if jobs.opens:
            raise ConnectionError("Airflow does not answer")
        return await opened(hook)

    monkeypatch.setattr(RayLMHook, "aget_conn", aget_conn)
    (event,) = asyncio.run(fired(on("c")))
    assert event["result"] == {"a": 1}
    with pytest.raises(ConnectionError):
        asyncio.run(fired(on("c")))
    assert jobs.opened == 0
