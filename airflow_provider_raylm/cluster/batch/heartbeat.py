"""While a task works its engine's lease is renewed, and its progress told.

Each in a thread of its own: a look at the engine may have to wait for Serve's controller, a renewal must not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from airflow_provider_raylm.cluster.batch.report import Tally
from airflow_provider_raylm.cluster.engine import leases, status
from airflow_provider_raylm.cluster.periodic import Periodic
from airflow_provider_raylm.specs import Progress

HEARTBEAT_PERIOD_S = 10.0
SAY_PERIOD_S = 30.0

Say = Callable[[str], None]
Tell = Callable[[Progress, bool], None]


@contextmanager
def heartbeat(application: str, output: str, tally: Tally, say: Say, tell: Tell) -> Iterator[None]:
    """Renew the engine's lease and tell the progress while the body runs."""
    started = said_at = time.monotonic()
    said_trouble = None

    def renew() -> None:
        leases.renew(application, output)

    def progress() -> None:
        nonlocal said_at, said_trouble
        now = time.monotonic()
        due = bool(tally.rows) and now - said_at >= SAY_PERIOD_S - HEARTBEAT_PERIOD_S / 2
        if due:
            said_at = now
        if tally.rows or tally.total is not None:
            tell(tally.progress(round(now - started, 3), round(time.time(), 3)), due)
        trouble = status.trouble(application)
        if trouble and trouble != said_trouble:
            say(f"the engine is not well: {trouble}; what was in flight is asked again when it is back")
        said_trouble = trouble

    with suppress(leases.SilentLease):
        renew()
    threads = (
        Periodic("raylm-heartbeat", "renewing the engine's lease", HEARTBEAT_PERIOD_S, renew, say),
        Periodic("raylm-progress", "looking at the engine", HEARTBEAT_PERIOD_S, progress, say),
    )
    try:
        yield
    finally:
        for thread in threads:
            thread.stop(leases.LEASE_CALL_TIMEOUT_S)
        leases.release(application, output)
