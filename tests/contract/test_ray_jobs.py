"""What every RayJobs promises: the fake that ships with the package, and real Ray with and without a token."""

import json
import time
from contextlib import closing
from functools import partial

import pytest

from airflow_provider_raylm.errors import EngineError, SpecError
from airflow_provider_raylm.following import Follower, Stopped, submit_or_attach
from airflow_provider_raylm.packages import pack
from airflow_provider_raylm.polling import PENDING, STOPPED, SUCCEEDED, TERMINAL, Watch
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.sealing import new_pad
from airflow_provider_raylm.specs import RuntimeEnv
from airflow_provider_raylm.testing import FakeRayJobs
from airflow_provider_raylm.wire import RESULT_SENTINEL, outcome
from tests.clusters import ray_cluster

SWEEP = {"delete": [], "max_age": None, "installation": "nobody"}
RESERVED = {"num_cpus": 0.01, "memory": 512 << 20}
LABELS = {"installation": "i", "dag_id": "d", "run_id": "r", "engine": "e"}
REF = {
    "application": "raylm-e-0123456789",
    "deployment": "engine",
    "model": "m",
    "fingerprint": "f",
    "labels": LABELS,
    "lease": {},
}


@pytest.fixture(scope="module", params=["fake", "token", "no token"])
def jobs(request):
    if request.param == "fake":
        yield FakeRayJobs()
        return
    pytest.importorskip("ray")
    if request.param == "token":
        cluster = request.getfixturevalue("cluster")
        with closing(cluster.client(entrypoint=RESERVED)) as client:
            yield client
        return
    with ray_cluster(token=False) as cluster, closing(cluster.client(entrypoint=RESERVED)) as client:
        yield client


def finish(jobs, request):
    """Run a job to its end and return its result."""
    assert jobs.submit(request)
    return Follower(jobs, request.submission_id, lambda line: None, 0.5).wait(Watch())


def test_it_tells_its_version(jobs):
    """Which shows that it answers and accepts the token."""
    assert jobs.ray_version()
    assert jobs.dashboard_url.startswith("http")


def test_an_unknown_job(jobs):
    """It is absent, has no log, and is not an error to stop."""
    assert jobs.get("raylm-no-such-job") is None
    assert jobs.logs("raylm-no-such-job") == jobs.logs("raylm-no-such-job", 3) == ""
    jobs.stop("raylm-no-such-job")


def test_a_job_ends_with_its_result(jobs):
    """The end of its log can be read alone, and its id is taken from then on."""
    request = JobRequest("raylm-contract-sweep", "sweep", SWEEP, {"task_id": "sweep", "clear_number": "1"})
    result = finish(jobs, request)
    log = jobs.logs(request.submission_id)

    assert result == outcome(log) == {"engines": [], "deleted": []}
    assert jobs.get(request.submission_id).status == SUCCEEDED
    assert jobs.get(request.submission_id).metadata == request.metadata
    assert jobs.logs(request.submission_id, 1).startswith(RESULT_SENTINEL)
    assert jobs.logs(request.submission_id, 2) == "".join(log.splitlines(keepends=True)[-2:])
    assert jobs.logs(request.submission_id, 1000) == log
    assert jobs.submit(request) is False
    jobs.stop(request.submission_id)
    assert jobs.get(request.submission_id).status == SUCCEEDED


def test_a_job_is_given_code_and_credentials(jobs, tmp_path):
    """It runs with them, says nothing of them, and a second one is given them again."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "rows.py").write_text("")
    environment = pack(RuntimeEnv(env_vars={"A": "b"}, py_modules=("beside",), working_dir="beside"), tmp_path)
    storage = {"s3": {"key": "k", "secret": "c0ntract-s3cr3t"}}
    for number in (1, 2):
        request = JobRequest(f"raylm-contract-given-{number}", "sweep", SWEEP, {}, environment, storage)
        assert finish(jobs, request) == {"engines": [], "deleted": []}
        assert "s3cr3t" not in jobs.logs(request.submission_id)


def test_jobs_are_listed(jobs):
    """With what they do, for which engine, how they stand, and when they ended."""
    metadata = {"task_id": "listed", "application": REF["application"]}
    began = time.time()
    finish(jobs, JobRequest("raylm-sweep-contract-listed", "sweep", SWEEP, metadata))
    (found,) = [one for one in jobs.all_jobs() if one.submission_id == "raylm-sweep-contract-listed"]

    assert (found.verb, found.application, found.info.metadata) == ("sweep", REF["application"], metadata)
    assert found.info.status == SUCCEEDED
    assert began - 5 <= found.ended_at <= time.time() + 5


def test_an_error_arrives_as_what_it_was(jobs, tmp_path):
    """The class and the sentence that the cluster raised."""
    (tmp_path / "s.txt").write_text("a row\n")
    batch = {"source": str(tmp_path / "s.txt"), "prompt": "${text}", "output": str(tmp_path / "o")}
    with pytest.raises(EngineError, match=r"raylm-e-0123456789 is gone.*Clear the deploy task"):
        finish(jobs, JobRequest("raylm-contract-gone", "infer", {"engine": REF, "batch": batch}))
    bad = {"engine": {"name": "e"}, "labels": LABELS, "replace": False}
    with pytest.raises(SpecError, match=r"EngineSpec\.model"):
        finish(jobs, JobRequest("raylm-contract-spec", "deploy", bad))


def test_a_plan_needs_no_engine(jobs, tmp_path):
    """It says what a task would read, and nothing is written."""
    (tmp_path / "s.jsonl").write_text('{"text": "a row"}\n')
    batch = {"source": str(tmp_path / "s.jsonl"), "prompt": "${text}", "output": str(tmp_path / "o")}
    plan = finish(jobs, JobRequest("raylm-contract-plan", "plan", {"batch": batch}))

    assert set(plan) == {"files", "rows", "bytes", "columns", "answers"}
    assert plan["files"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


def test_a_preview_needs_an_engine(jobs, tmp_path):
    """And its request, with what seals the rows, says nothing of that."""
    (tmp_path / "s.txt").write_text("a row\n")
    batch = {"source": str(tmp_path / "s.txt"), "prompt": "${text}", "output": str(tmp_path / "o")}
    payload = {"engine": REF, "batch": batch, "rows": 1, "spread": False, "texts": True}
    request = JobRequest("raylm-contract-preview", "preview", payload, pad=new_pad())
    with pytest.raises(EngineError, match=r"raylm-e-0123456789 is gone"):
        finish(jobs, request)
    assert [path.name for path in tmp_path.iterdir()] == ["s.txt"]


def test_a_job_that_has_not_started(jobs):
    """It is seen waiting, with since when and Ray's reason; told to stop, it ends when it would start."""
    if isinstance(jobs, FakeRayJobs):
        jobs.pend("pending", looks=2)
    began = time.time()
    request = JobRequest("raylm-contract-pending", "sweep", SWEEP, {"task_id": "pending"})
    assert jobs.submit(request)
    job = jobs.get(request.submission_id)
    jobs.stop(request.submission_id)

    assert (job.status, job.started) == (PENDING, False)
    # Two clocks, of which one counts in milliseconds.
    assert began - 5 <= job.submitted_at <= time.time() + 5
    assert job.message.startswith("Job has not started yet.")
    with pytest.raises(Stopped, match="was stopped"):
        Follower(jobs, request.submission_id, lambda line: None, 0.5).wait(Watch())
    ended = jobs.get(request.submission_id)
    assert (ended.status, ended.started, ended.submitted_at) == (STOPPED, True, job.submitted_at)


def test_tearing_down_what_is_not_there(jobs):
    """It is success."""
    request = JobRequest("raylm-contract-teardown", "teardown", {"application": "raylm-e-0123456789"})

    assert finish(jobs, request)["existed"] is False


def test_no_engine_can_take_work(jobs):
    """Whether or not Serve runs there."""
    assert jobs.running_engines() == ()
    assert jobs.all_engines() == ()


def test_a_second_try_attaches_or_starts_anew(jobs):
    """A job that has ended gives the next attempt the next number, unless nobody has had its result."""
    said = []

    def request(attempt, cleared="0"):
        return JobRequest(f"raylm-contract-again-{attempt}", "sweep", SWEEP, {"clear_number": cleared})

    first = submit_or_attach(jobs, request, said.append)
    attached = submit_or_attach(jobs, request, said.append)
    ended = jobs.get(first).status in TERMINAL
    Follower(jobs, first, said.append, 0.5).wait(Watch())
    second = submit_or_attach(jobs, request, said.append)
    Follower(jobs, second, said.append, 0.5).wait(Watch())

    taken = submit_or_attach(jobs, request, said.append, take_result=True)
    third = submit_or_attach(jobs, partial(request, cleared="1"), said.append, take_result=True)
    Follower(jobs, third, said.append, 0.5).wait(Watch())

    assert (taken, third) == (second, f"{second[:-1]}{int(second[-1]) + 1}")
    assert first == "raylm-contract-again-1"
    assert attached == ("raylm-contract-again-2" if ended else first)
    assert second != first


def test_names_with_any_characters(jobs):
    """What a run id holds cannot reach another path of the API."""
    odd = "raylm/../x?y#z%2e é"

    assert jobs.get(odd) is None
    jobs.stop(odd)


def test_a_job_of_before_the_task_was_cleared_is_stopped(cluster):
    """And the next one is started; on real Ray, where a job can be caught in the act."""
    spec = {"name": "e", "model": "m", "tensor_parallel_size": 99, "scale_up_timeout": 600}

    def request(attempt, cleared):
        payload = {"engine": spec, "labels": LABELS, "replace": False}
        return JobRequest(f"raylm-contract-cleared-{attempt}", "deploy", payload, {"clear_number": cleared})

    said = []
    with closing(cluster.client()) as jobs:
        first = submit_or_attach(jobs, partial(request, cleared="0"), said.append)
        attached = submit_or_attach(jobs, partial(request, cleared="0"), said.append)
        second = submit_or_attach(jobs, partial(request, cleared="1"), said.append)
        try:
            assert (attached, jobs.get(first).status) == (first, STOPPED)
            assert (second, jobs.get(second).status in TERMINAL) == ("raylm-contract-cleared-2", False)
        finally:
            jobs.stop(second)
    assert f"stopping Ray job {first}, which runs since before the task was cleared" in said


def test_a_stopped_job_raises_at_its_follower(cluster):
    """On real Ray, where a job can be caught in the act: the log is forwarded, and the end is no result."""
    with closing(cluster.client()) as jobs:
        spec = {"name": "e", "model": "m", "tensor_parallel_size": 99, "scale_up_timeout": 600}
        request = JobRequest("raylm-contract-stop", "deploy", {"engine": spec, "labels": LABELS, "replace": False})
        assert jobs.submit(request)
        follower = Follower(jobs, request.submission_id, lambda line: follower.end(), 0.5)

        with pytest.raises(Stopped):
            follower.wait(Watch())
        with pytest.raises(Stopped, match="was stopped"):
            Follower(jobs, request.submission_id, lambda line: None, 0.5).wait(Watch())
    # The deploy that was stopped half-way removes what it has created. Ray gives it three seconds for that; where that
    # is not enough, the engine's lease does, which nobody tells any more that the engine is waited for.
    end = time.monotonic() + 120
    while cluster.run("sweep", {**SWEEP, "installation": "i"})["engines"] and time.monotonic() < end:
        time.sleep(1)
    assert time.monotonic() < end


def test_the_fake_keeps_a_job_as_ray_does():
    """Statuses are Ray's words."""
    fake = FakeRayJobs()
    finish(fake, JobRequest("a", "sweep", SWEEP))

    assert fake.get("a").status == SUCCEEDED
    assert json.loads(fake.submitted[0].wire())["payload"] == SWEEP
