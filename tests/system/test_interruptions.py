"""Users, workers, triggerers and clocks that interrupt a task: what happens to its job, its engine, and its rows."""

import os
import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

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

    def __init__(self, scene, dag_id, rows=ROWS):
        self.scene, self.dag_id = scene, dag_id
        self.before = {job["submission_id"] for job in scene.inference_jobs()}
        self.batch = scene.batch(scene.table(rows), **BATCH)
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
        return sorted(written(Path(self.batch["output"])))

    def log(self, attempt=1):
        return self.scene.airflow.log(self.dag_id, self.run, "work", attempt)

    def attempts(self):
        return self._instance()["try_number"]

    def triggerer(self):
        """Return the id of the triggerer that has the task's trigger, or None."""
        return (self._instance()["triggerer_job"] or {}).get("id")

    def _instance(self):
        (instance,) = self.scene.airflow.instances(self.dag_id, self.run)
        return instance


@pytest.mark.parametrize(
    ("dag_id", "wish"),
    [
        ("chaos_on_an_engine", "failed"),
        ("chaos_on_an_engine", "success"),
        ("chaos_on_an_engine", "clear"),
        ("chaos_deferred", "failed"),
        ("chaos_deferred", "success"),
        ("chaos_deferred", "clear"),
    ],
)
def test_a_user_stops_the_job(scene, dag_id, wish):
    """Marked or cleared, running or deferred; the engine gives up what it was asked. Cleared, it is done at once."""
    work = Work(scene, dag_id)
    if wish == "clear":
        scene.airflow.clear(dag_id, work.run, "work")
    else:
        scene.airflow.mark(dag_id, work.run, "work", wish)
    scene.until(lambda: work.jobs()[work.job] == "STOPPED", STOP_TIMEOUT_S)
    if wish != "clear":
        scene.until(scene.is_idle, STOP_TIMEOUT_S)

    assert work.wait() == ("success" if wish == "clear" else wish)
    rows = work.rows()
    assert len(rows) == len(set(rows))
    assert (len(rows) == ROWS) == (wish == "clear")
    assert work.attempts() == (2 if wish == "clear" else 1)


@pytest.mark.parametrize(
    ("dag_id", "words"),
    [("chaos_on_an_engine_in_time", "AirflowTaskTimeout"), ("chaos_deferred_in_time", "was not done in time")],
)
def test_execution_timeout_stops_the_job(scene, dag_id, words):
    """Airflow does not look at it while a task is deferred; the trigger does."""
    work = Work(scene, dag_id)

    assert work.wait() == "failed"
    scene.until(lambda: work.jobs()[work.job] == "STOPPED", STOP_TIMEOUT_S)
    assert 0 < len(work.rows()) < ROWS
    assert words in work.log()


def test_a_triggerer_that_is_killed_is_replaced(scene):
    """The job goes on, is never submitted again, and the next triggerer follows it; links are there meanwhile."""
    work = Work(scene, "chaos_deferred")
    links = scene.airflow.links("chaos_deferred", work.run, "work")
    for process in triggerer(scene):
        process.kill()
    start_triggerer(scene)

    assert work.wait() == "success"
    assert links["Ray job"].endswith(work.job)
    assert links["Serve application"].endswith(scene.engine["application"])
    assert links["Output"] == work.batch["output"]
    assert work.jobs() == {work.job: "SUCCEEDED"}
    assert len(work.rows()) == ROWS
    assert work.log().count(f"{ROWS} rows in = {ROWS} written") == 1


def test_a_triggerer_that_stands_still_is_replaced(scene):
    """Told by Airflow to cancel when it goes on, it leaves the job to the one that has taken over."""
    rows = 2 * ROWS
    work = Work(scene, "chaos_deferred", rows)
    first = scene.until(work.triggerer, 10)
    stood_still = triggerer(scene)
    for process in stood_still:
        process.suspend()
    start_triggerer(scene)
    scene.until(lambda: work.triggerer() != first, 90)
    assert work.jobs() == {work.job: "RUNNING"}
    for process in stood_still:
        process.resume()

    assert work.wait() == "success"
    assert work.jobs() == {work.job: "SUCCEEDED"}
    assert len(work.rows()) == rows
    assert work.log().count(f"{rows} rows in = {rows} written") == 1


def triggerer(scene):
    """Return the processes of Airflow's triggerers."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        environ, words = process.info["environ"] or {}, " ".join(process.info["cmdline"] or ())
        if "triggerer" in words and environ.get("AIRFLOW_HOME") == scene.airflow.environ["AIRFLOW_HOME"]:
            found.append(process)
    return found


def start_triggerer(scene):
    """Start one more, for as long as the scene lasts."""
    command = [sys.executable, "-m", "airflow", "triggerer", "--skip-serve-logs"]
    process = subprocess.Popen(
        command, env=scene.airflow.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    scene.stack.callback(process.wait)
    scene.stack.callback(local.end_session, process.pid)


def test_a_result_that_nobody_took_is_taken_by_the_retry(scene):
    """The job succeeds while the task's process hangs; the process is killed; nothing runs again."""
    work = Work(scene, "chaos_on_an_engine")
    process = int(Path(f"{work.batch['output']}.pid").read_text())
    os.kill(process, signal.SIGSTOP)
    scene.until(lambda: work.jobs()[work.job] == "SUCCEEDED", RUN_TIMEOUT_S)
    os.kill(process, signal.SIGKILL)

    assert work.wait() == "success"
    assert work.jobs() == {work.job: "SUCCEEDED"}
    report = scene.airflow.xcom("chaos_on_an_engine", work.run, "work")
    assert (report["rows_written"], report["rows_already_done"]) == (ROWS, 0)
    assert f"Ray job {work.job} has succeeded already" in work.log(attempt=2)


@pytest.mark.parametrize("dag_id", ["chaos_redeploys", "chaos_partitions"])
def test_a_deploy_that_is_marked_failed_leaves_no_engine(scene, dag_id):
    """Running and deferred: its teardown does not run then."""
    batch = {**scene.batch("unused"), "source": [str(scene.table(1))]}
    run = scene.airflow.trigger(dag_id, {"engine": scene.spec("own"), "batch": batch})
    scene.until(scene.engines, 120)
    scene.airflow.mark(dag_id, run, "deploy", "failed")

    assert scene.airflow.wait(dag_id, run, RUN_TIMEOUT_S) == "failed"
    scene.until(lambda: not scene.engines(), 60)
    assert scene.airflow.states(dag_id, run)["deploy"] == "failed"


@pytest.mark.parametrize("fault", [task_process_killed, dagrun_timeout])
def test_no_row_and_no_engine_is_lost(scene, fault):
    """As in tests/chaos, at one moment."""
    accounts = fault(scene)

    assert (accounts.rows_lost, accounts.rows_duplicated) == (0, 0)
    assert not scene.engines()


def test_an_engine_that_somebody_else_deploys_is_waited_for(scene):
    """Without a worker; it is used, and still there afterwards."""
    rows = 10
    batch = scene.batch(scene.table(rows))
    run = scene.airflow.trigger("chaos_finds", {"batch": batch})
    scene.until(lambda: scene.airflow.states("chaos_finds", run)["find"] == "deferred", 60)
    late = scene.deploy("late")

    assert scene.airflow.wait("chaos_finds", run, RUN_TIMEOUT_S) == "success"
    assert scene.airflow.xcom("chaos_finds", run, "find")["application"] == late["application"]
    assert len(written(Path(batch["output"]))) == rows
    assert scene.engines() == {late["application"]}
    scene.teardown(late)


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
