"""The faults: each makes one thing go wrong at a random moment and returns the accounts."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from airflow_provider_raylm.errors import BatchError, RayLMError
from tests.chaos.scene import Accounts, Scene, kill
from tests.chaos.witness import DEADLY, WITNESS

ROWS = 5_000
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
def other_run_ends(scene):
    """Two runs have an engine each, and both work; one is torn down."""
    other = scene.deploy("other", env={WITNESS: f"{scene.witness}-other"})
    others = scene.batch(scene.table(ROWS))
    job = scene.start(others, other)
    accounts = _task_survives(scene, lambda: scene.teardown(other))
    _end(scene, job)
    return accounts


@fault
def driver_killed(scene):
    """Airflow's retry goes on."""
    batch = scene.batch(scene.table(ROWS))
    with scene.accounted(batch, ROWS) as accounts:
        job = scene.start(batch)
        scene.at_a_random_moment(batch)
        kill(scene.driver(batch))
        harmed = time.monotonic()
        with pytest.raises(RayLMError):
            scene.finish(job)
        scene.retry(batch)
        accounts.recovery_s = time.monotonic() - harmed
    return accounts


@fault
def row_kills_engine(scene):
    """One row at which vLLM's worker dies, every time it is asked."""
    deadly = scene.chance.randrange(ROWS)
    batch = scene.batch(scene.table(ROWS, bad=lambda i: f"{DEADLY} {i}" if i == deadly else None))
    started = time.monotonic()
    with scene.accounted(batch, ROWS) as accounts:
        report = scene.finish(scene.start(batch))
        accounts.recovery_s = time.monotonic() - started
    assert report["failures"] == {"engine_failure": 1}, report
    return accounts


@fault
def poison_rows(scene):
    """Five in a hundred of 10,000 rows that no engine can answer, of every kind."""
    kinds = ["word " * 2_000, "", "\x00\x01\x02", "x" * 2**20, " \u2028\n"]
    rows = 10_000
    batch = scene.batch(scene.table(rows, bad=lambda i: kinds[i // 20 % len(kinds)] if i % 20 == 0 else None))
    with scene.accounted(batch, rows) as accounts:
        scene.finish(scene.start(batch))
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
    with _disk(scene, "128k") as folder:
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
        ended = [_end(scene, job) for job in jobs]
        if not any(ended):
            scene.retry(batch)
    return accounts


def _end(scene, job):
    try:
        return bool(scene.finish(job))
    except RayLMError as error:
        print(f"chaos: {job} ended with {error}", flush=True)
        return False
