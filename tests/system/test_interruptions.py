"""Users, workers, triggerers and clocks that interrupt a task: what happens to its job, its engine, and its rows."""

import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import psutil
import pytest

from airflow_provider_raylm import local
from tests.chaos.airflow_faults import dagrun_timeout, task_process_killed
from tests.chaos.scene import Scene, written
from tests.offline import ENGINE_KWARGS

ROWS = 2_000
# Half a minute and more on two cores: a user has to be in time.
BATCH = {"max_tokens": 256}
RUN_TIMEOUT_S = 300
# Until Ray has the job as stopped: Airflow tells a running task within five seconds, and Ray gives the job three.
STOP_TIMEOUT_S = 10


@pytest.fixture(scope="module")
def scene(cluster):
    """An Airflow, and an engine that no task of it deployed."""
    with ExitStack() as stack:
        scene = Scene(cluster, random.Random(0), stack, ENGINE_KWARGS)
        scene.engine = scene.deploy("shared")
        yield scene
        scene.teardown(scene.engine)


class Work:
    """A task at work: its batch, its run, and its jobs."""

    def __init__(self, scene, dag_id):
        self.scene, self.dag_id = scene, dag_id
        self.before = {job["submission_id"] for job in scene.inference_jobs()}
        self.batch = scene.batch(scene.table(ROWS), **BATCH)
        self.run = scene.airflow.trigger(dag_id, {"engine": scene.engine, "batch": self.batch})
        scene.at_a_random_moment(self.batch)
        (self.job,) = self.jobs()

    def jobs(self):
        """Return the states of the jobs of this task by id."""
        jobs = self.scene.inference_jobs()
        return {job["submission_id"]: job["status"] for job in jobs if job["submission_id"] not in self.before}

    def wait(self):
        return self.scene.airflow.wait(self.dag_id, self.run, RUN_TIMEOUT_S)

    def rows(self):
        return sorted(written(self.scene.cluster.folder / self.batch["output"]))


@pytest.mark.parametrize(
    ("dag_id", "wish"),
    [
        ("chaos_on_an_engine", "failed"),
        ("chaos_on_an_engine", "clear"),
        ("chaos_deferred", "failed"),
        ("chaos_deferred", "success"),
        ("chaos_deferred", "clear"),
    ],
)
def test_a_user_stops_the_job(scene, dag_id, wish):
    """Marked or cleared, running or deferred; cleared, it is then done, with no row twice."""
    work = Work(scene, dag_id)
    if wish == "clear":
        scene.airflow.clear(dag_id, work.run, "work")
    else:
        scene.airflow.mark(dag_id, work.run, "work", wish)
    scene.until(lambda: work.jobs()[work.job] == "STOPPED", STOP_TIMEOUT_S)

    assert work.wait() == ("success" if wish == "clear" else wish)
    rows = work.rows()
    assert len(rows) == len(set(rows))
    assert (len(rows) == ROWS) == (wish == "clear")


def test_a_triggerer_that_is_killed_is_replaced(scene):
    """The job goes on, is never submitted again, and the next triggerer follows it."""
    work = Work(scene, "chaos_deferred")
    for process in psutil.Process(scene.airflow.pid).children(recursive=True):
        if "triggerer" in " ".join(process.cmdline()):
            process.kill()
    with another_triggerer(scene.airflow):
        assert work.wait() == "success"

    assert work.jobs() == {work.job: "SUCCEEDED"}
    assert len(work.rows()) == ROWS
    log = scene.airflow.log("chaos_deferred", work.run, "work")
    assert log.count(f"{ROWS} rows in = {ROWS} written") == 1


@contextmanager
def another_triggerer(airflow):
    command = [sys.executable, "-m", "airflow", "triggerer"]
    process = subprocess.Popen(
        command, env=airflow.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        time.sleep(5)
        local.end_session(process.pid)
        process.wait()


@pytest.mark.parametrize("fault", [task_process_killed, dagrun_timeout])
def test_no_row_and_no_engine_is_lost(scene, fault):
    """As in tests/chaos, at one moment."""
    accounts = fault(scene)

    assert (accounts.rows_lost, accounts.rows_duplicated) == (0, 0)
    assert not scene.engines()


def test_a_task_that_is_cleared_when_its_engine_is_gone_says_so(scene):
    """In one sentence, at once; and that is for good until the deploy task is cleared, too."""
    engine = {**scene.engine, "application": "raylm-shared-0000000000"}
    run = scene.airflow.trigger("chaos_on_an_engine", {"engine": engine, "batch": scene.batch(scene.table(10))})
    scene.until(lambda: scene.airflow.states("chaos_on_an_engine", run)["work"] == "up_for_retry", 120)

    log = scene.airflow.log("chaos_on_an_engine", run, "work")
    assert "The engine raylm-shared-0000000000 is gone" in log
    assert "Clear the deploy task together with this one" in log
    scene.airflow.mark("chaos_on_an_engine", run, "work", "failed")


def test_a_task_that_may_deploys_its_engine_again(scene):
    """In its retry, and the run's teardown deletes that engine, too. The end of a lease looks the same to a task."""
    batch = scene.batch(scene.table(ROWS), **BATCH)
    run = scene.airflow.trigger("chaos_redeploys", {"engine": scene.spec("own"), "batch": batch})
    scene.at_a_random_moment(batch)
    scene.teardown(scene.airflow.xcom("chaos_redeploys", run, "deploy"))

    assert scene.airflow.wait("chaos_redeploys", run, RUN_TIMEOUT_S) == "success"
    rows = written(scene.cluster.folder / batch["output"])
    assert (len(rows), len(set(rows))) == (ROWS, ROWS)
    log = scene.airflow.log("chaos_redeploys", run, "work")
    assert "is gone" in log, log
    assert "max_map_retries" not in log, log
    assert "deploying it again (redeploy)" in scene.airflow.log("chaos_redeploys", run, "work", attempt=2)
    assert not scene.engines()
