"""Users, workers, triggerers and clocks that interrupt a task: what happens to its job, its engine, and its rows."""

import os
import signal
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from tests.chaos import airflow_faults
from tests.chaos.gate import gate
from tests.chaos.marks import HELD
from tests.chaos.scene import FIRST_PART_TIMEOUT_S, parts, written
from tests.chaos.scripted_engine import LOADS_FOR, scripted
from tests.system.conftest import SHORT_LEASE

# More than the engine works on at a time: some wait for their places.
ROWS = 400
BATCH = {"max_tokens": 8}
RUN_TIMEOUT_S = 300
# Until Ray has the job as stopped: Airflow tells a running task within five seconds, and Ray gives the job three; twice
# that on a machine that is busy.
STOP_TIMEOUT_S = 20
# Of the DAGs whose ids say so.
EXECUTION_TIMEOUT_S = 30
# A request to a silent cluster takes up to thirty seconds.
NOT_DELAYED_S = 25
# Until the engine has given up what a job that was stopped had asked.
GIVEN_UP_S = 5


FAULTS = [
    airflow_faults.task_process_killed,
    airflow_faults.dashboard_unreachable,
    airflow_faults.marked_failed,
    airflow_faults.marked_failed_while_deferred,
    airflow_faults.dagrun_timeout,
]
FEW = {
    "ROWS": 2_000,
    # Half a minute, if nobody marks them.
    "MARKED_ROWS": 1_200,
    "LONGER": {"max_tokens": 240},
    "STOP_TIMEOUT_S": STOP_TIMEOUT_S,
    "TIMED_OUT_ROWS": 600,
    "TIMED_OUT": {"max_tokens": 16},
    "LEASE": SHORT_LEASE,
    "UNREACHABLE_S": 15,
}


@pytest.fixture(scope="module")
def scene(scene):
    """With an engine that no task of Airflow's deployed, and that holds rows for as long as a test wants."""
    jobs = scripted(scene.cluster)
    scene.engine = jobs.run("deploy", scene.wanted("standing"))
    yield scene
    scene.hold.unlink(missing_ok=True)
    scene.teardown(scene.engine)


class Work:
    """A task at work: its batch, its run, and its jobs. A quarter is answered; the engine holds the rest."""

    def __init__(self, scene, dag_id):
        self.scene, self.dag_id = scene, dag_id
        self.before = {job["submission_id"] for job in scene.inference_jobs()}
        self.batch = held_batch(scene)
        self.run = scene.airflow.trigger(dag_id, {"engine": scene.engine, "batch": self.batch})
        scene.until(lambda: parts(self.batch), FIRST_PART_TIMEOUT_S)
        (self.job,) = self.jobs()

    def jobs(self):
        """Return the states of the jobs of this task by id."""
        jobs = self.scene.inference_jobs()
        return {job["submission_id"]: job["status"] for job in jobs if job["submission_id"] not in self.before}

    def wait(self):
        """Let the engine answer what it holds; return the run's state when it has ended."""
        self.scene.hold.unlink(missing_ok=True)
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


def held_batch(scene):
    """Return a batch of which the engine holds three quarters."""
    scene.hold.touch()
    return scene.batch(scene.table(ROWS, lambda i: f"row {i} {HELD if i >= ROWS // 4 else ''}"), **BATCH)


def test_a_silent_cluster_and_a_token_that_changes(scene):
    """Who waits for another cluster is not delayed; who was deferred with the old token continues with the new one."""
    with gate(scene.cluster, "old-token") as before_it:
        scene.airflow.connect("raylm_gated", **before_it.connection(scene.runs_on))
        gated = Work(scene, "chaos_gated")
        scene.until(lambda: gated.triggerer() is not None, 30)
        before_it.silence()
        scene.hold.unlink()
        other = scene.airflow.trigger(
            "chaos_deferred", {"engine": scene.engine, "batch": scene.batch(scene.table(ROWS), **BATCH)}
        )
        assert scene.airflow.wait("chaos_deferred", other, RUN_TIMEOUT_S) == "success"
        (seen,) = scene.airflow.instances("chaos_deferred", other)
        ended = max(job["end_time"] for job in scene.inference_jobs()) / 1000
        assert datetime.fromisoformat(seen["end_date"]).timestamp() - ended < NOT_DELAYED_S
        before_it.token = "new-token"
        before_it.speak()
        scene.until(lambda: before_it.refused, 60)
        scene.airflow.connect("raylm_gated", **before_it.connection(scene.runs_on))

        assert gated.wait() == "success"
        assert (gated.attempts(), len(gated.rows()), len(gated.jobs())) == (1, ROWS, 2)


@pytest.mark.parametrize(
    ("dag_id", "wish"),
    [
        ("chaos_on_an_engine", "clear"),
        ("chaos_deferred", "success"),
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
        time.sleep(GIVEN_UP_S)
        asked = scene.asked()
        scene.hold.unlink()
        time.sleep(1)
        assert scene.asked() == asked, "rows that waited for their places have got them"

    assert work.wait() == ("success" if wish == "clear" else wish)
    rows = work.rows()
    assert len(rows) == len(set(rows))
    assert (len(rows) == ROWS) == (wish == "clear")
    assert work.attempts() == (2 if wish == "clear" else 1)


def test_execution_timeout_stops_the_job(scene):
    """Airflow does not look at it while a task is deferred; the trigger does."""
    words = {"chaos_on_an_engine_in_time": "AirflowTaskTimeout", "chaos_deferred_in_time": "was not done in time"}
    works = [Work(scene, dag_id) for dag_id in words]

    for work in works:
        scene.until(lambda work=work: work.jobs()[work.job] == "STOPPED", EXECUTION_TIMEOUT_S + STOP_TIMEOUT_S)
    for work in works:
        assert work.wait() == "failed"
        assert 0 < len(work.rows()) < ROWS
        assert words[work.dag_id] in work.log()


def test_a_triggerer_that_is_killed_is_replaced(scene):
    """The job goes on, is never submitted again, and the next triggerer follows it; links are there meanwhile."""
    work = Work(scene, "chaos_deferred")
    links = scene.airflow.links("chaos_deferred", work.run, "work")
    for process in triggerer(scene):
        process.kill()
    scene.standing.start_triggerer()

    assert work.wait() == "success"
    assert links["Ray job"].endswith(work.job)
    assert links["Serve application"].endswith(scene.engine["application"])
    assert links["Output"] == work.batch["output"]
    assert work.jobs() == {work.job: "SUCCEEDED"}
    assert len(work.rows()) == ROWS
    assert work.log().count(f"{ROWS} rows in = {ROWS} written") == 1


def test_a_triggerer_that_stands_still_is_replaced(scene):
    """Told by Airflow to cancel when it continues, it leaves the job to the one that has taken over."""
    work = Work(scene, "chaos_deferred")
    first = scene.until(work.triggerer, 10)
    stood_still = triggerer(scene)
    for process in stood_still:
        process.suspend()
    scene.standing.start_triggerer()
    scene.until(lambda: work.triggerer() != first, 90)
    assert work.jobs() == {work.job: "RUNNING"}
    for process in stood_still:
        process.resume()

    assert work.wait() == "success"
    assert work.jobs() == {work.job: "SUCCEEDED"}
    assert len(work.rows()) == ROWS
    assert work.log().count(f"{ROWS} rows in = {ROWS} written") == 1


def triggerer(scene):
    """Return the processes of Airflow's triggerers."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        environ, words = process.info["environ"] or {}, " ".join(process.info["cmdline"] or ())
        if "triggerer" in words and environ.get("AIRFLOW_HOME") == scene.airflow.environ["AIRFLOW_HOME"]:
            found.append(process)
    return found


def test_a_result_that_nobody_took_is_taken_by_the_retry(scene):
    """The job succeeds while the task's process hangs; the process is killed; nothing runs again."""
    work = Work(scene, "chaos_on_an_engine")
    process = int(Path(f"{work.batch['output']}.pid").read_text())
    os.kill(process, signal.SIGSTOP)
    scene.hold.unlink()
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
    spec = scene.spec("own", env={LOADS_FOR: "600"})
    run = scene.airflow.trigger(dag_id, {"engine": spec, "batch": batch})
    scene.until(scene.engines, 120)
    scene.airflow.mark(dag_id, run, "deploy", "failed")

    assert scene.airflow.wait(dag_id, run, RUN_TIMEOUT_S) == "failed"
    scene.until(lambda: not scene.engines(), 60)
    assert scene.airflow.states(dag_id, run)["deploy"] == "failed"


@pytest.mark.parametrize("fault", FAULTS)
def test_no_row_and_no_engine_is_lost(scene, fault, monkeypatch):
    """As in tests/chaos, at one moment; marked as failed, a task's job is stopped as soon as by another wish."""
    for name, value in FEW.items():
        monkeypatch.setattr(airflow_faults, name, value)
    accounts = fault(scene)

    assert (accounts.rows_lost, accounts.rows_duplicated) == (0, 0)
    assert not scene.engines()


def test_an_engine_that_somebody_else_deploys_is_waited_for(scene):
    """Without a worker; it is used, and still there afterwards."""
    rows = 10
    batch = scene.batch(scene.table(rows))
    run = scene.airflow.trigger("chaos_finds", {"batch": batch})
    scene.until(lambda: scene.airflow.states("chaos_finds", run)["find"] == "deferred", 60)
    late = scripted(scene.cluster).run("deploy", scene.wanted("late"))

    assert scene.airflow.wait("chaos_finds", run, RUN_TIMEOUT_S) == "success"
    assert scene.airflow.xcom("chaos_finds", run, "find")["application"] == late["application"]
    assert len(written(Path(batch["output"]))) == rows
    assert scene.engines() == {late["application"]}
    scene.teardown(late)


def test_a_task_that_is_cleared_when_its_engine_is_gone_says_so(scene):
    """In one sentence, at once; and that is for good until the deploy task is cleared, too."""
    engine = {**scene.engine, "application": "raylm-shared-0000000000"}
    run = scene.airflow.trigger("chaos_on_an_engine", {"engine": engine, "batch": scene.batch(scene.table(10))})
    assert scene.airflow.wait("chaos_on_an_engine", run, 120) == "failed"

    log = scene.airflow.log("chaos_on_an_engine", run, "work")
    assert "The engine raylm-shared-0000000000 is gone" in log
    assert "Clear the deploy task together with this one" in log
    (work,) = scene.airflow.instances("chaos_on_an_engine", run)
    assert work["try_number"] == 1, "a retry meets the same"


def test_a_task_that_may_deploys_its_engine_again(scene):
    """In its retry, and the run's teardown deletes that engine, too. The end of a lease looks the same to a task."""
    batch = held_batch(scene)
    run = scene.airflow.trigger("chaos_redeploys", {"engine": scene.spec("own"), "batch": batch})
    scene.until(lambda: parts(batch), FIRST_PART_TIMEOUT_S)
    scene.teardown(scene.airflow.xcom("chaos_redeploys", run, "deploy"))
    scene.hold.unlink()

    assert scene.airflow.wait("chaos_redeploys", run, RUN_TIMEOUT_S) == "success"
    rows = written(scene.cluster.folder / batch["output"])
    assert (len(rows), len(set(rows))) == (ROWS, ROWS)
    log = scene.airflow.log("chaos_redeploys", run, "work")
    assert "is gone" in log, log
    assert "max_map_retries" not in log, log
    assert "deploying it again (redeploy)" in scene.airflow.log("chaos_redeploys", run, "work", attempt=2)
    assert not scene.engines()
