"""What a task does with a job that does not start."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from airflow_provider_raylm import following, polling
from airflow_provider_raylm.errors import ClusterError, SpecError
from airflow_provider_raylm.following import Follower, Stopped, patiently, submit_or_attach
from airflow_provider_raylm.operators.raylm import TeardownEngineOperator
from airflow_provider_raylm.polling import FAILED, PENDING, JobInfo, Unreachable, Watch
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.specs import Progress
from airflow_provider_raylm.testing import FakeRayJobs
from airflow_provider_raylm.triggers.raylm import RayJobTrigger
from airflow_provider_raylm.wire import progress_in, progress_line, said_line
from tests.airflows import TaskDeferred


def request(attempt, cleared="0"):
    payload = {"delete": [], "max_age": None, "installation": "i"}
    return JobRequest(f"job-{attempt}", "sweep", payload, {"task_id": "sweep", "clear_number": cleared})


def test_a_job_that_does_not_start_fails_the_task(monkeypatch):
    """After pending_timeout, with Ray's reason, having been told to stop."""
    monkeypatch.setattr(polling, "PENDING_SAID_AFTER_S", 0.0)
    jobs, said, stopped = FakeRayJobs(), [], []
    jobs.pend("sweep", message="No room.")
    monkeypatch.setattr(jobs, "stop", stopped.append)
    job = submit_or_attach(jobs, request, said.append)
    with pytest.raises(ClusterError, match=r"job-1 has not started within pending_timeout \(0\.1 s\).*No room\."):
        Follower(jobs, job, said.append, 0.01).wait(Watch(pending_timeout=0.1))

    assert stopped == ["job-1"]
    assert said[1:] == ["Ray job job-1 waits to start, for 0 s so far: No room."]


def test_a_retry_does_not_attach_to_a_job_that_did_not_start():
    """It was told to stop: it would end as soon as it starts. One that may still start is attached to."""
    jobs, said = FakeRayJobs(), []
    jobs.pend("sweep")
    assert submit_or_attach(jobs, request, said.append) == "job-1"
    assert submit_or_attach(jobs, request, said.append) == "job-1"
    time.sleep(0.02)
    assert submit_or_attach(jobs, request, said.append, pending_timeout=0.01) == "job-2"
    assert "Ray job job-1 has not started in time: it is told to stop, and left behind" in said


def test_a_cleared_task_does_not_wait_for_a_job_that_does_not_start(monkeypatch):
    """Ray stops it when it starts."""
    monkeypatch.setattr(following, "STOP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(following, "STOP_PERIOD_S", 0.01)
    jobs = FakeRayJobs()
    jobs.pend("sweep")
    submit_or_attach(jobs, request, print)

    assert submit_or_attach(jobs, lambda attempt: request(attempt, "1"), print) == "job-2"
    assert jobs.get("job-1").status == PENDING


class Silent(FakeRayJobs):
    """Refuses so many requests of each kind, and takes those for a job without telling."""

    def __init__(self, times):
        super().__init__()
        self._left = dict.fromkeys(("get", "submit", "stop"), times)

    def _silence(self, name):
        self._left[name] -= 1
        if self._left[name] >= 0:
            raise Unreachable("no answer.")

    def get(self, submission_id):
        self._silence("get")
        return super().get(submission_id)

    def submit(self, request):
        if self._left["submit"] == 1:
            super().submit(request)
        self._silence("submit")
        return super().submit(request)

    def stop(self, submission_id):
        self._silence("stop")
        super().stop(submission_id)


@pytest.fixture
def soon(monkeypatch):
    """Try again at once."""
    monkeypatch.setattr(following, "RETRY_PERIOD_S", 0.01)


def test_a_silent_cluster_is_borne_from_the_first_request_on(soon):
    """Said once for each silence; a job that was taken without an answer is attached to."""
    jobs, said = Silent(3), []

    assert submit_or_attach(jobs, request, said.append) == "job-1"
    assert len(jobs.submitted) == 1
    assert said == [
        "no answer. Trying again for 300 s.",
        "an answer again after 0 s",
        "no answer. Trying again for 300 s.",
        "an answer again after 0 s",
        "attached to Ray job job-1, which is running already",
    ]
    Follower(jobs, "job-1", said.append, 0.01).end()
    assert jobs._stopped == {"job-1"}


def test_a_cluster_that_stays_silent_fails_the_task(soon, monkeypatch):
    """And the job that could not be told to stop is named by the request."""
    monkeypatch.setattr(following, "STOP_OUTAGE_LIMIT_S", 0.05)
    jobs = Silent(10**6)

    with pytest.raises(Unreachable):
        Follower(jobs, "job-1", print, 0.01).end()
    with pytest.raises(Unreachable):
        patiently(lambda: jobs.get("job-1"), print, limit=0.05)


def test_a_task_that_is_told_to_end_does_not_bear_silence(soon):
    """It has no job yet."""
    task = TeardownEngineOperator(task_id="teardown", engine="e")
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="teardown", map_index=-1, xcom_push=lambda key, value: None)
    jobs = Silent(10**6)
    threading.Timer(0.3, task.on_kill).start()
    with jobs.installed(), pytest.raises(Stopped, match="told to end while the cluster was silent"):
        task.execute({"ti": ti, "dag_run": SimpleNamespace(clear_number=0)})


def test_a_result_whose_log_is_gone_is_not_waited_for(monkeypatch):
    """Ray keeps logs for a while only: the task runs again, and finds what is done."""
    jobs, said = FakeRayJobs(), []
    assert submit_or_attach(jobs, request, said.append) == "job-1"
    assert submit_or_attach(jobs, request, said.append, take_result=True) == "job-1"
    monkeypatch.setattr(jobs, "logs", lambda submission_id, lines=None: "")
    assert submit_or_attach(jobs, request, said.append, take_result=True) == "job-2"


def test_a_job_that_ray_could_not_start(monkeypatch):
    """Ray's own sentence is the reason, not what stands in its log."""
    jobs = FakeRayJobs()
    words = "Job supervisor actor failed to start within 900 seconds."
    monkeypatch.setattr(jobs, "get", lambda submission_id: JobInfo(FAILED, words, started=False))
    monkeypatch.setattr(jobs, "logs", lambda submission_id, lines=None: "Runtime env is setting up.\n")

    with pytest.raises(ClusterError, match=r"job-1 could not be started\. Ray says: Job supervisor actor failed"):
        Follower(jobs, "job-1", print, 0.01).wait(Watch())


@pytest.mark.parametrize("bad", ["5", -1, float("nan"), None])
@pytest.mark.parametrize("field", ["poll_interval", "pending_timeout", "drain_timeout"])
def test_what_is_no_time_to_wait_is_refused(field, bad):
    """When the task is made, and not when it waits."""
    with pytest.raises(SpecError, match=f"{field}: .* is no number of seconds"):
        TeardownEngineOperator(task_id="teardown", engine="e", **{field: bad})


@pytest.mark.parametrize("deferrable", [False, True])
def test_an_operator_bounds_the_start(deferrable):
    """On a worker and in the triggerer alike; what is no bound is refused."""
    for bad in (0, -1, float("nan")):
        with pytest.raises(SpecError, match="pending_timeout: .* is no number of seconds above 0"):
            TeardownEngineOperator(task_id="teardown", engine="e", pending_timeout=bad)
    task = TeardownEngineOperator(
        task_id="teardown", engine="e", deferrable=deferrable, poll_interval=0.01, pending_timeout=0.1
    )
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="teardown", map_index=-1, xcom_push=lambda key, value: None)
    jobs = FakeRayJobs()
    jobs.pend("teardown")
    with jobs.installed():
        if not deferrable:
            with pytest.raises(ClusterError, match="has not started within pending_timeout"):
                task.execute({"ti": ti, "dag_run": SimpleNamespace(clear_number=0)})
            return
        with pytest.raises(TaskDeferred) as deferred:
            task.execute({"ti": ti, "dag_run": SimpleNamespace(clear_number=0)})
        _, arguments = deferred.value.trigger.serialize()
        event = asyncio.run(fired(RayJobTrigger(**arguments)))
        with pytest.raises(ClusterError, match="has not started within pending_timeout"):
            task.resume({}, event)


async def fired(trigger):
    (event,) = [event.payload async for event in trigger.run()]
    return event


class Growing(FakeRayJobs):
    """A job whose log grows, of which it counts what is read."""

    def __init__(self):
        super().__init__()
        self.written, self.read = [], []

    def get(self, submission_id):
        return JobInfo("RUNNING")

    def logs(self, submission_id, lines=None):
        told = self.written[-lines:] if lines else self.written
        self.read.append(len(told))
        return "".join(f"{line}\n" for line in told)


def test_a_look_reads_the_end_of_a_log_alone():
    """However long it has grown; what is beyond is read when lines are missing, and only then."""
    jobs, heard = Growing(), []
    follower = Follower(jobs, "job-1", heard.append, 0.01)
    jobs.written += [said_line(number, str(number)) for number in range(1, 501)]
    follower.step(Watch())
    assert heard == [str(number) for number in range(1, 501)]

    jobs.read.clear()
    for number in range(501, 601):
        jobs.written += [*["noise"] * 20, said_line(number, str(number))]
        follower.step(Watch())
    assert max(jobs.read) == following.LOOK_LINES[0] < len(jobs.written) / 50
    assert (heard[500:], len(jobs.read)) == ([str(number) for number in range(501, 601)], 100)

    jobs.read.clear()
    jobs.written += [said_line(601, "601"), *["noise"] * 2000, said_line(602, "602"), "raylm 6"]
    follower.step(Watch())
    follower.step(Watch())
    assert heard[600:] == ["601", "602"]
    assert jobs.read == [40, 1000, len(jobs.written), 40]


def test_a_line_that_is_lost_is_not_looked_for_again():
    """Two processes wrote at a time: it is in no log."""
    jobs, heard = Growing(), []
    follower = Follower(jobs, "job-1", heard.append, 0.01)
    jobs.written += [said_line(1, "one"), f"noise{said_line(2, 'two')}", said_line(3, "three")]
    follower.step(Watch())
    jobs.read.clear()
    follower.step(Watch())

    assert heard == ["one", "three"]
    assert len(jobs.read) == 1


def test_a_job_that_has_not_started_has_no_log_to_look_at():
    """Ray's state API takes the question for an error."""
    jobs = Growing()
    jobs.get = lambda submission_id: JobInfo(PENDING, started=False)
    Follower(jobs, "job-1", print, 0.01).step(Watch())

    assert jobs.read == []


def test_progress_is_one_record_for_all_readers():
    """Every record is for who measures; one with a number is a line of the task's log, too, as people read it."""
    jobs, heard, measured = Growing(), [], []
    follower = Follower(jobs, "job-1", heard.append, 0.01, measured.append)
    records = [Progress(at=at, seconds=at, rows=at, total=100, failures={"timeout": 2}) for at in (10, 20, 30)]
    jobs.written += [said_line(1, "one"), progress_line(None, records[0]), "noise", progress_line(2, records[1])]
    follower.step(Watch())
    follower.step(Watch())
    assert heard == ["one", "20 of 100 rows, 2 failed, 1.0 rows/s, 0 tokens/s, 80 s left"]
    assert measured == [records[1]]

    jobs.written += [progress_line(None, records[2]), "raylm - progress: {", 'raylm 3 progress: {"rows": []}']
    follower.step(Watch())
    assert (len(heard), measured[1:]) == (2, [records[2]])
    assert progress_in(jobs.logs("job-1")) == tuple(records)
