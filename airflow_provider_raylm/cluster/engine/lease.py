"""The deployment that deletes its own application when nobody renews it.

Airflow may die between deploy and teardown, and a timed-out run skips its teardown. The lease lives beside the engine,
in the same application, without a CPU of its own, so that the engine's end never depends on Airflow.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from ray import serve

from airflow_provider_raylm.cluster.periodic import Periodic
from airflow_provider_raylm.specs import BatchReport, EngineSeconds, EngineUsage, Labels, Lease

CHECK_PERIOD_S = 5.0
# A task renews every 10 seconds; one that missed three is dead.
WORKING_S = 30.0
# So does whoever waits until the engine is up. After so long a silence nobody does: the next attempt of a deploy takes
# its time to begin.
AWAITED_S = 60.0


def expiry(bounds: Lease, deployed_at: float, renewed_at: float, now: float) -> str | None:
    """Return why the lease is over, or None while it holds. Times are Unix seconds."""
    if now - deployed_at >= bounds.max_lifetime:
        return f"the engine is older than max_lifetime ({bounds.max_lifetime:g} s)"
    if now - renewed_at >= bounds.idle_timeout:
        return f"no task has worked for idle_timeout ({bounds.idle_timeout:g} s)"
    return None


class TimeSheet:
    """Whom an engine's time goes to, from *now* on (Unix seconds). It loads until it is up."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._up = False
        self._loading = 0.0
        self._idle = 0.0
        self._tasks: dict[str, float] = {}

    def advance(self, now: float, working: Collection[str]) -> None:
        """Book the time since the last call on those who are *working*, in equal shares."""
        seconds, self._at = max(now - self._at, 0.0), max(now, self._at)
        if not self._up:
            self._loading += seconds
        elif not working:
            self._idle += seconds
        for one in working:
            self._tasks[one] = self._tasks.get(one, 0.0) + seconds / len(working)

    def up(self) -> None:
        """Say that the engine can take work."""
        self._up = True

    def spent(self) -> EngineSeconds:
        """Return the sums."""
        tasks = {one: round(seconds, 3) for one, seconds in self._tasks.items()}
        return EngineSeconds(loading=round(self._loading, 3), idle=round(self._idle, 3), tasks=tasks)


class LeaseKeeper:
    """Knows whose engine this is, what it has done, and when it has to go.

    Args:
        application: the Serve application to delete at the end.
        labels: the owner, as JSON values.
        bounds: the lease, as JSON values.
        deployed_at: Unix seconds; an argument, so that a restarted replica does not begin a new life.
        idle_from: Unix seconds from which idleness counts at the earliest, until somebody renews.
        engine: the engine's handle; binding it makes the engine part of this application.
    """

    def __init__(
        self,
        application: str,
        labels: dict[str, str],
        bounds: dict[str, float],
        deployed_at: float,
        idle_from: float,
        engine: Any,
    ) -> None:
        self._application = application
        self._labels = Labels.model_validate(labels)
        self._bounds = Lease.model_validate(bounds)
        self._deployed_at = deployed_at
        now = time.time()
        # One that Serve has restarted does not know when it was renewed last, or whether the engine was up before.
        self._renewed_at = max(idle_from, now)
        self._awaited_at = now if now - deployed_at < AWAITED_S else None
        self._working: dict[tuple[str, str], float] = {}
        self._usage = EngineUsage()
        self._sheet = TimeSheet(deployed_at)
        self._said: str | None = None
        self._watch = Periodic("raylm-lease", "deleting the engine", CHECK_PERIOD_S, self._delete_if_over, _say)

    async def reconfigure(self, _ref: dict[str, Any]) -> None:
        """Take the engine's reference, which Serve shows to whoever looks for the engine, and do nothing with it."""

    async def awaited(self) -> None:
        """Take note that somebody waits until the engine is up; who is the first to know that it is calls ``renew``.

        From then on it is in use, whoever still waits, or says so late.
        """
        if self._awaited_at is not None:
            self._awaited_at = time.time()

    async def renew(self, output: str | None = None, attempt: str = "") -> list[str]:
        """Begin the idle time anew, and return the outputs of the tasks that work; *output*'s is one of them.

        The first to call is the deploy, when the engine is up. A task's attempts have names of their own.
        """
        self._renewed_at = time.time()
        self._sheet.advance(self._renewed_at, self._at_work(self._renewed_at))
        self._sheet.up()
        self._awaited_at = None
        if output is not None:
            self._working[output, attempt] = self._renewed_at
        return self._at_work(self._renewed_at)

    async def release(self, output: str, attempt: str = "") -> None:
        """Say that this attempt is not at work any more."""
        self._renewed_at = time.time()
        self._sheet.advance(self._renewed_at, self._at_work(self._renewed_at))
        self._working.pop((output, attempt), None)

    async def record(self, report: dict[str, Any]) -> None:
        """Add a finished task's report to the engine's usage."""
        self._renewed_at = time.time()
        self._usage = self._usage.plus(BatchReport.model_validate(report))

    async def describe(self) -> dict[str, Any]:
        """Return labels, age in seconds, who is working, usage, and whom the time went to, as JSON values."""
        now = time.time()
        working = self._at_work(now)
        self._sheet.advance(now, working)
        return {
            "labels": self._labels.model_dump(),
            "age_seconds": now - self._deployed_at,
            "working": working,
            "usage": self._usage.model_dump(),
            "spent": self._sheet.spent().model_dump(),
        }

    def _at_work(self, now: float) -> list[str]:
        working = (output for (output, _), renewed_at in self._working.items() if now - renewed_at < WORKING_S)
        return list(dict.fromkeys(working))

    def _delete_if_over(self) -> None:
        """Ask for the deletion as often as it takes: this process ends with the application."""
        now = time.time()
        # A task renews every ten seconds, which an idle_timeout may be shorter than.
        renewed_at = now if self._at_work(now) else self._renewed_at
        reason = expiry(self._bounds, self._deployed_at, renewed_at, now) or self._abandoned(now)
        if reason is not None and reason != self._said:
            _say(f"deleting {self._application}: {reason}")
        self._said = reason
        if reason is not None:
            serve.delete(self._application, _blocking=False)

    def _abandoned(self, now: float) -> str | None:
        """Return why an engine that nobody has used yet will not be, or None: whoever deployed it may have died."""
        if self._awaited_at is None or now - self._awaited_at < AWAITED_S:
            return None
        return f"nobody has waited for the engine to start for {AWAITED_S:g} s"


def _say(line: str) -> None:
    print(f"raylm: {line}", flush=True)
