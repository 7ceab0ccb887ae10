"""The faults: each makes one thing go wrong at a random moment and returns the accounts."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_raylm.cluster.engine.lease import AWAITED_S, CHECK_PERIOD_S, WORKING_S
from airflow_provider_raylm.errors import BatchError, EngineError, RayLMError
from tests.chaos.marks import DEADLY, WITNESS
from tests.chaos.quick_scaling import quickly_scaling
from tests.chaos.scene import Accounts, Scene, application, at_most_redone, kill, parts

ROWS = 5_000
KILLED_ROWS = 10_000
KILLS = 20
LONG_TOKENS = 400
# Of a task for which one replica is not enough, for as long as a second takes to start; and of one for which it is.
MUCH_TOKENS = 160
LITTLE_ROWS = 480
# Until a replica has come, or has gone.
SCALED_S = 180
POISONED_ROWS = 10_000
SMALL_DISK = "128k"
# Of an engine whose deploy is killed, further fields; and the seconds that its deploy, and any engine's teardown, take
# at least.
HALF: dict[str, Any] = {}
DEPLOY_S = 10
TEARDOWN_S = 8
Fault = Callable[[Scene], Accounts]
FAULTS: dict[str, Fault] = {}


def fault(case: Fault) -> Fault:
    FAULTS[case.__name__] = case
    return case


def _task_survives(scene: Scene, harm: Callable[[], None]) -> Accounts:
    """Harm the engine while a task works; the same attempt has to finish."""
    batch = scene.batch(scene.table(ROWS))
    with scene.accounted(batch, ROWS) as accounts:
        job = scene.start(batch)
        scene.at_a_random_moment(batch)
        harmed = time.monotonic()
        harm()
        scene.finish(job)
        accounts.recovery_s = time.monotonic() - harmed
    return accounts


@fault
def replica_killed(scene):
    return _task_survives(scene, lambda: kill(scene.replica()))


@fault
def engine_core_killed(scene):
    return _task_survives(scene, lambda: kill(scene.engine_core()))


@fault
def engine_core_hangs(scene):
    return _task_survives(scene, lambda: os.kill(scene.engine_core().pid, signal.SIGSTOP))


@fault
def replica_of_two_killed(scene):
    """The other one continues, and takes what was lost."""
    engine = scene.deploy("two", replicas=2)
    application = engine["application"]
    batch = scene.batch(scene.table(ROWS))
    with scene.accounted(batch, ROWS) as accounts:
        job = scene.start(batch, engine)
        scene.at_a_random_moment(batch)
        harmed = time.monotonic()
        kill(scene.replica(application))
        report = scene.finish(job)
        accounts.recovery_s = time.monotonic() - harmed
        scene.teardown(engine)
    assert report["failures"] == {}, report
    return accounts


@fault
def scaled_down_under_load(scene):
    """An engine that autoscales loses a replica while it works: it answers first what it has, and nothing is redone."""
    engine = quickly_scaling(scene.cluster).run("deploy", scene.wanted("scaling", replicas=[1, 2]))
    application = engine["application"]
    # So much that one replica is not enough; then so little, for longer, that one of two is too many.
    much = scene.batch(scene.table(ROWS), max_tokens=MUCH_TOKENS)
    rows = LITTLE_ROWS
    little = scene.batch(scene.table(rows), max_tokens=LONG_TOKENS, block_rows=16, in_flight_rows=32)
    asked = scene.asked()
    with scene.accounted(little, rows) as accounts:
        jobs = [scene.start(much, engine)]
        scene.until(lambda: len(scene.replicas(application)) == 2, SCALED_S)
        jobs.append(scene.start(little, engine))
        scene.at_a_random_moment(little)
        reports = [scene.finish(jobs[0])]
        harmed = time.monotonic()
        scene.until(lambda: len(scene.replicas(application)) == 1, SCALED_S)
        accounts.recovery_s = time.monotonic() - harmed
        assert len(parts(little)) * little["block_rows"] < rows, "the task was done before a replica went"
        reports.append(scene.finish(jobs[1]))
    scene.teardown(engine)
    assert [report["failures"] for report in reports] == [{}, {}], reports
    accounts.rows_redone = scene.asked() - asked - rows - ROWS
    assert accounts.rows_redone == 0, accounts
    return accounts


@fault
def killed_amid_long_answers(scene):
    """The engine dies when rows have been in it for long: no time of theirs has run out, and none is at fault."""
    rows = ROWS // 10
    batch = scene.batch(scene.table(rows), max_tokens=LONG_TOKENS, block_rows=16)
    with scene.accounted(batch, rows) as accounts:
        job = scene.start(batch)
        scene.at_a_random_moment(batch)
        harmed = time.monotonic()
        kill(scene.engine_core())
        report = scene.finish(job)
        accounts.recovery_s = time.monotonic() - harmed
    assert report["failures"] == {}, report
    return accounts


@fault
def heartbeat_controller_restarted(scene):
    """Serve's controller dies and comes back; the lease, a short one, is renewed, and the engine is there after."""
    rows = ROWS // 10
    engine = scene.deploy("brief", lease={"idle_timeout": WORKING_S, "max_lifetime": 3600})
    # So few at a time that the task outlives a lease that nobody renews.
    batch = scene.batch(scene.table(rows), max_tokens=LONG_TOKENS, block_rows=16, in_flight_rows=16)
    with scene.accounted(batch, rows) as accounts:
        job = scene.start(batch, engine)
        scene.at_a_random_moment(batch)
        controller = scene.process("ServeController")
        harmed = time.monotonic()
        kill(controller)
        scene.until(lambda: (now := scene.process("ServeController")) and now.pid != controller.pid, 60)
        scene.finish(job)
        accounts.recovery_s = time.monotonic() - harmed
        described = scene.described(engine)
        scene.teardown(engine)
    assert accounts.recovery_s > WORKING_S + CHECK_PERIOD_S, "too short to tell whether the lease was renewed"
    assert (described["status"], described["working"]) == ("RUNNING", [])
    assert described["usage"]["requests"] == rows
    return accounts


@fault
def other_run_ends(scene):
    """Two runs have an engine each, and both work; one is torn down."""
    other = scene.deploy("other", env={WITNESS: f"{scene.witness}-other"})
    # With long answers: it has to be at work when it is torn down.
    job = scene.start(scene.batch(scene.table(ROWS), max_tokens=240), other)
    torn_down = []

    def harm():
        scene.teardown(other)
        torn_down.append(time.monotonic())
        with pytest.raises(EngineError, match="is gone"):
            scene.finish(job)
        torn_down.append(time.monotonic())

    accounts = _task_survives(scene, harm)
    assert torn_down[1] - torn_down[0] < 60, "its own task waits for an engine that is gone"
    return accounts


def _kill_job(scene: Scene) -> None:
    for process in [scene.driver(), scene.process("AnswerAndWrite")]:
        kill(process)


@fault
def driver_killed(scene):
    """Airflow's retry continues. The stage's actor may finish what it has begun before Ray ends it."""
    return _killed(scene, 1, lambda: kill(scene.driver()), within=1)


@fault
def job_killed_twenty_times(scene):
    """The driver, and the stage's actor, which then finishes nothing."""
    # With few rows in flight: there have to be some left for twenty attempts.
    return _killed(scene, KILLS, lambda: _kill_job(scene), within=0.3, block_rows=16, in_flight_rows=128)


@fault
def driver_killed_on_s3(scene):
    """With source and output on an object store."""
    return _killed(scene, 1, lambda: kill(scene.driver()), within=1, on_s3=True)


@fault
def job_killed_twenty_times_on_s3(scene):
    return _killed(scene, KILLS, lambda: _kill_job(scene), within=0.3, on_s3=True, block_rows=16, in_flight_rows=128)


@fault
def s3_overloaded(scene):
    """It answers 503 SlowDown for a while, longer than its client tries again."""
    batch = scene.batch(scene.table_on_s3(ROWS))
    with scene.accounted(batch, ROWS) as accounts:
        job = scene.start(batch)
        scene.at_a_random_moment(batch)
        scene.s3.overloaded = True
        try:
            with pytest.raises(RayLMError, match="cannot write s3://"):
                scene.finish(job)
        finally:
            scene.s3.overloaded = False
        again = time.monotonic()
        scene.retry(batch)
        accounts.recovery_s = time.monotonic() - again
    return accounts


def _killed(
    scene: Scene, kills: int, harm: Callable[[], None], within: float, on_s3: bool = False, **fields: int
) -> Accounts:
    rows = KILLED_ROWS
    batch = scene.batch(scene.table_on_s3(rows) if on_s3 else scene.table(rows), **fields)
    with scene.accounted(batch, rows) as accounts:
        for _ in range(kills):
            job = scene.start(batch)
            scene.at_a_random_moment(batch, within)
            harm()
            harmed = time.monotonic()
            with pytest.raises(RayLMError):
                scene.finish(job)
        scene.retry(batch)
        accounts.recovery_s = time.monotonic() - harmed
    assert accounts.rows_redone <= kills * at_most_redone(batch), accounts
    return accounts


@fault
def row_kills_engine(scene):
    """One row at which vLLM's worker dies, every time it is asked."""
    deadly = scene.chance.randrange(ROWS)
    # One cut of a block this small leaves one row: a start of the engine less.
    batch = scene.batch(scene.table(ROWS, lambda i: f"{DEADLY if i == deadly else ''} row {i}"), block_rows=16)
    started = time.monotonic()
    with scene.accounted(batch, ROWS) as accounts:
        report = scene.finish(scene.start(batch))
        accounts.recovery_s = time.monotonic() - started
    assert report["failures"] == {"engine_failure": 1}, report
    return accounts


# What no engine can answer, and what only looks like it: control characters, half a character, nested values.
POISON = ["word " * 2_000, None, "x" * 2**20, "", " \u2028\n"]
STRANGE = ["\x00\x01\x02", "half \ud800", {"nested": [{}]}]


@fault
def poison_rows(scene):
    """Five in a hundred of 10,000 rows."""
    rows, kinds = POISONED_ROWS, POISON + STRANGE
    poison = range(0, rows, 20)
    table = scene.table(rows, lambda i: kinds[i // 20 % len(kinds)] if i in poison else f"row {i}")
    batch = scene.batch(table)
    with scene.accounted(batch, rows) as accounts:
        scene.finish(scene.start(batch))
    assert accounts.rows_quarantined == sum(i // 20 % len(kinds) < len(POISON) for i in poison)
    return accounts


@contextmanager
def _disk(scene: Scene, size: str) -> Iterator[Path]:
    """Yield the folder of a file system of that size. Root may write wherever permissions alone forbid it."""
    folder = scene.cluster.folder / f"disk-{time.monotonic_ns()}"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _remount(folder: Path, options: str) -> bool:
    return subprocess.run(["mount", "-o", f"remount,{options}", str(folder)]).returncode == 0


@fault
def disk_full(scene):
    """The output's disk fills in the middle; the task says so, and its retry completes when there is room."""
    with _disk(scene, SMALL_DISK) as folder:
        batch = scene.batch(scene.table(ROWS), output=str(folder / "out"))
        with scene.accounted(batch, ROWS) as accounts:
            with pytest.raises(BatchError, match="No space left"):
                scene.finish(scene.start(batch))
            assert _remount(folder, "size=64m")
            scene.retry(batch)
        return accounts


@fault
def output_read_only(scene):
    """The output may not be written; the task says so, and its retry completes when it may."""
    with _disk(scene, "64m") as folder:
        batch = scene.batch(scene.table(ROWS), output=str(folder / "out"))
        with scene.accounted(batch, ROWS) as accounts:
            job = scene.start(batch)
            scene.at_a_random_moment(batch, within=0.5)
            # Refused while a file is open for writing.
            scene.until(lambda: _remount(folder, "ro"), 20)
            with pytest.raises(BatchError, match="Read-only file system"):
                scene.finish(job)
            assert _remount(folder, "rw")
            scene.retry(batch)
        return accounts


@fault
def two_attempts_at_once(scene):
    """A zombie and its retry."""
    batch = scene.batch(scene.table(ROWS))
    with scene.accounted(batch, ROWS) as accounts:
        jobs = [scene.start(batch)]
        scene.at_a_random_moment(batch)
        jobs.append(scene.start(batch))
        ended = [end(scene, job) for job in jobs]
        if not any(ended):
            scene.retry(batch)
    return accounts


def end(scene, job):
    try:
        return bool(scene.finish(job))
    except RayLMError as error:
        print(f"chaos: {job} ended with {error}", flush=True)
        return False


@fault
def broken_model(scene):
    with pytest.raises(EngineError, match="/no/such/model"):
        scene.deploy("broken", model="/no/such/model")
    return Accounts()


@fault
def deploy_killed(scene):
    """Nobody is left to clean up but the lease."""
    job = scene.cluster.start("deploy", scene.wanted("half", **HALF))
    started = time.monotonic()
    scene.until(lambda: scene.replica(application("half")), 60)
    time.sleep(scene.chance.uniform(0, DEPLOY_S))
    kill(scene.driver("deploy"))
    assert not end(scene, job)
    scene.until(scene.engines, 30)
    scene.until(lambda: not scene.engines(), 2 * AWAITED_S)
    return Accounts(recovery_s=time.monotonic() - started)


@fault
def teardown_thrice(scene):
    """Killed half-way, then done, then once more."""
    engine = scene.deploy("torn")
    job = scene.cluster.start("teardown", {"application": engine["application"]})
    teardown = scene.until(lambda: scene.driver("teardown"), 60)
    time.sleep(scene.chance.uniform(0, TEARDOWN_S))
    with suppress(ProcessLookupError):
        kill(teardown)
    end(scene, job)
    scene.teardown(engine)
    assert scene.teardown(engine)["existed"] is False
    return Accounts()
