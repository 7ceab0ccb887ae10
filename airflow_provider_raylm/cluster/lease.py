"""The deployment that deletes its own application when nobody renews it.

Airflow may die between deploy and teardown, and a timed-out run skips its teardown. The lease lives beside the engine,
in the same application, without a CPU of its own, so that the engine's end never depends on Airflow.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ray import serve

from airflow_provider_raylm.specs import BatchReport, EngineUsage, Labels, Lease

CHECK_PERIOD_S = 5.0
# A task renews every 10 seconds; one that missed three is dead.
WORKING_S = 30.0


def expiry(bounds: Lease, deployed_at: float, renewed_at: float, now: float) -> str | None:
    """Return why the lease is over, or None while it holds. Times are Unix seconds."""
    if now - deployed_at >= bounds.max_lifetime:
        return f"the engine is older than max_lifetime ({bounds.max_lifetime:g} s)"
    if now - renewed_at >= bounds.idle_timeout:
        return f"no task has worked for idle_timeout ({bounds.idle_timeout:g} s)"
    return None


class LeaseKeeper:
    """Knows whose engine this is, what it has done, and when it has to go.

    Args:
        application: the Serve application to delete at the end.
        labels: the owner, as JSON values.
        bounds: the lease, as JSON values.
        deployed_at: Unix seconds; an argument, so that a restarted replica does not begin a new life.
        idle_from: Unix seconds from which idleness counts, until somebody renews.
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
        self._renewed_at = idle_from
        self._working: dict[str, float] = {}
        self._usage = EngineUsage()
        threading.Thread(target=self._delete_when_over, name="raylm-lease", daemon=True).start()

    async def renew(self, output: str | None = None) -> None:
        """Begin the idle time anew; if *output* is given, the task that writes it is working."""
        self._renewed_at = time.time()
        if output is not None:
            self._working[output] = self._renewed_at

    async def release(self, output: str) -> None:
        """Say that it is not any more."""
        self._renewed_at = time.time()
        self._working.pop(output, None)

    async def record(self, report: dict[str, Any]) -> None:
        """Add a finished task's report to the engine's usage."""
        self._renewed_at = time.time()
        self._usage = self._usage.plus(BatchReport.model_validate(report))

    async def describe(self) -> dict[str, Any]:
        """Return labels, age in seconds, who is working, and usage, as JSON values."""
        now = time.time()
        return {
            "labels": self._labels.model_dump(),
            "age_seconds": now - self._deployed_at,
            "working": [output for output, renewed_at in self._working.items() if now - renewed_at < WORKING_S],
            "usage": self._usage.model_dump(),
        }

    def _delete_when_over(self) -> None:
        while True:
            time.sleep(CHECK_PERIOD_S)
            reason = expiry(self._bounds, self._deployed_at, self._renewed_at, time.time())
            if reason:
                print(f"raylm: deleting {self._application}: {reason}", flush=True)
                serve.delete(self._application, _blocking=False)
