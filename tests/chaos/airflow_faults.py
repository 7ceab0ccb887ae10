"""The faults in which Airflow has a part: its processes die, its clock runs out, its user changes his mind."""

import os
import signal
import time
from pathlib import Path

from tests.chaos.faults import fault
from tests.chaos.marks import HELD
from tests.chaos.scene import parts

ROWS = 4_000
# Long enough that the fault strikes a task that works: half a minute on two cores.
LONG = {"max_tokens": 64}
# Two seconds for a hundred rows.
LONGER = {"max_tokens": 480}
RUN_TIMEOUT_S = 400.0
UNREACHABLE_S = 60
MARKED_ROWS = 1_500
# Until Ray has a job as stopped, and the engine has given up what was in flight.
STOP_TIMEOUT_S = 80
IDLE_TIMEOUT_S = 15
# More than a minute: longer than what is left of the run's time when the engine is up.
TIMED_OUT_ROWS = 3_000
TIMED_OUT = LONGER
LEASE = {"idle_timeout": 20, "max_lifetime": 3600}


def _on_the_engine(scene, batch, dag_id="chaos_on_an_engine"):
    """Start a task of Airflow's on the scene's engine; return its run's id when it writes."""
    run = scene.airflow.trigger(dag_id, {"engine": scene.engine, "batch": batch})
    scene.at_a_random_moment(batch)
    return run


def _goes_on(scene, harm):
    """Harm what stands between Airflow and the job; the job continues, and there is never a second one."""
    jobs = len(scene.inference_jobs())
    batch = scene.batch(scene.table(ROWS), **LONG)
    with scene.accounted(batch, ROWS) as accounts:
        run = _on_the_engine(scene, batch)
        harm(batch)
        harmed = time.monotonic()
        state = scene.airflow.wait("chaos_on_an_engine", run, RUN_TIMEOUT_S)
        accounts.recovery_s = time.monotonic() - harmed
    assert state == "success", scene.airflow.states("chaos_on_an_engine", run)
    assert len(scene.inference_jobs()) == jobs + 1
    return accounts


@fault
def task_process_killed(scene):
    return _goes_on(scene, lambda batch: os.kill(int(Path(f"{batch['output']}.pid").read_text()), signal.SIGKILL))


@fault
def dashboard_unreachable(scene):
    def stop_it(batch):
        dashboard = scene.dashboard()
        dashboard.suspend()
        try:
            time.sleep(UNREACHABLE_S)
        finally:
            dashboard.resume()

    return _goes_on(scene, stop_it)


@fault
def marked_failed(scene):
    return _marked(scene, "chaos_on_an_engine")


@fault
def marked_failed_while_deferred(scene):
    return _marked(scene, "chaos_deferred")


def _marked(scene, dag_id):
    """The job stops and its requests are aborted; cleared later, the task completes."""
    rows = MARKED_ROWS
    batch = scene.batch(scene.table(rows), **LONGER)
    with scene.accounted(batch, rows) as accounts:
        run = _on_the_engine(scene, batch, dag_id)
        scene.airflow.mark(dag_id, run, "work", "failed")
        marked = time.monotonic()
        scene.until(lambda: not any(job["status"] == "RUNNING" for job in scene.inference_jobs()), STOP_TIMEOUT_S)
        # What was in flight would keep the engine busy for half a minute more.
        scene.until(scene.is_idle, IDLE_TIMEOUT_S)
        accounts.recovery_s = time.monotonic() - marked
        assert len(parts(batch)) * batch["block_rows"] < rows, "the task was done before it was marked"
        assert scene.airflow.wait(dag_id, run, RUN_TIMEOUT_S) == "failed"
        (work,) = scene.airflow.instances(dag_id, run)
        assert work["try_number"] == 1, "it was tried again"
        scene.airflow.clear(dag_id, run, "work")
        assert scene.airflow.wait(dag_id, run, RUN_TIMEOUT_S) == "success"
    return accounts


def _with_its_own(scene, batch):
    """Start a run with an engine of its own; return its id when its task writes."""
    spec = scene.spec("shared", lease=LEASE)
    run = scene.airflow.trigger("chaos_with_its_own", {"engine": spec, "batch": batch})
    scene.until(lambda: parts(batch), 300)
    return run


@fault
def dagrun_timeout(scene):
    """It skips the teardown: the lease ends the engine. The rows that are missing are answered by the next engine."""
    rows = TIMED_OUT_ROWS
    # A scripted engine holds half of them until the time is over; vLLM takes longer anyway.
    batch = scene.batch(scene.table(rows, lambda i: f"row {i} {HELD if i >= rows // 2 else ''}"), **TIMED_OUT)
    scene.hold.touch()
    with scene.accounted(batch, rows) as accounts:
        run = _with_its_own(scene, batch)
        assert scene.airflow.wait("chaos_with_its_own", run, RUN_TIMEOUT_S) == "failed"
        scene.hold.unlink()
        over = time.monotonic()
        states = scene.airflow.states("chaos_with_its_own", run)
        assert states["teardown"] == "skipped", states
        assert len(parts(batch)) * batch["block_rows"] < rows, "the task was done before the run's time was over"
        scene.until(lambda: not scene.engines(), 120)
        accounts.recovery_s = time.monotonic() - over
        scene.retry(batch)
    return accounts


@fault
def airflow_gone(scene):
    """For good, while a task works: the job ends by itself, and the lease ends the engine."""
    batch = scene.batch(scene.table(ROWS), **LONG)
    with scene.accounted(batch, ROWS) as accounts:
        _with_its_own(scene, batch)
        scene.standing.kill()
        killed = time.monotonic()
        scene.until(lambda: not scene.engines(), 300)
        accounts.recovery_s = time.monotonic() - killed
    return accounts
