"""One look at each cluster for all who have the page open: bounded in time, shared, and never repeated in haste.

A hundred viewers ask a dashboard no more often than one, and a cluster that is silent delays no other's engines.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from airflow_provider_raylm.errors import RayLMError
from airflow_provider_raylm.inventory import SeenEngine, SeenJob
from airflow_provider_raylm.polling import TERMINAL, Refused, Unreachable
from airflow_provider_raylm.ray_jobs import RayJobs
from airflow_provider_raylm.specs import Progress
from airflow_provider_raylm.wire import progress_in

log = logging.getLogger(__name__)

# For so long one look serves everybody.
KEPT_S = 3.0
# How long the page waits for a look that is under way, before it shows what was there before.
ANSWER_S = 2.0
# Per request to a dashboard.
REQUEST_S = 5.0
# Between two looks at a silent cluster: twice as long each time.
SILENT_FOR_S = (5.0, 30.0)
# Ray lists all jobs that it remembers, with all that they were told: a list that takes a second is asked for every ten.
JOBS_PAUSE = 10.0
JOBS_KEPT_S = 60.0
# Logs whose ends are read in one look, those that were read longest ago first; so many at a time.
TAILS = 40
TAILS_AT_A_TIME = 4
# A job tells its progress every ten seconds: what happened in forty minutes, and what since the last look.
FIRST_LINES, NEXT_LINES = 260, 40
HISTORY = 240

Connect = Callable[[], RayJobs]


@dataclass(frozen=True)
class Look:
    """What a cluster has shown.

    Attributes:
        at: Unix seconds; 0.0 when it has never answered.
        engines: all that are there.
        jobs: those of the engines that are there, as far as Ray has not forgotten them.
        histories: of the inference jobs at work, the progress records, the oldest first.
        dashboard_url: where people see more.
        trouble: why the last look failed; empty when it did not.
        state: ok, looking (the first answer is awaited), silent, refused, or broken (the connection cannot work).
    """

    at: float = 0.0
    engines: tuple[SeenEngine, ...] = ()
    jobs: tuple[SeenJob, ...] = ()
    histories: Mapping[str, tuple[Progress, ...]] = field(default_factory=dict)
    dashboard_url: str = ""
    trouble: str = ""
    state: str = "looking"


class Cluster:
    """One connection's cluster, as it was seen last."""

    def __init__(self) -> None:
        self.seen = Look()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="raylm-engines-page")
        self._lock = threading.Lock()
        self._look: Future[None] | None = None
        self._again_at = 0.0
        self._pause = SILENT_FOR_S[0]
        self._jobs_at = 0.0
        self._jobs: tuple[SeenJob, ...] = ()
        self._histories: dict[str, tuple[Progress, ...]] = {}
        self._read_at: dict[str, float] = {}

    def look(self, connect: Connect) -> Future[None] | None:
        """Return the look that is under way, which begins now if the last one is too old; None if it is not."""
        with self._lock:
            if self._look is not None and not self._look.done():
                return self._look
            if time.monotonic() < self._again_at:
                return None
            self._look = self._threads.submit(self._try, connect)
            return self._look

    def expire(self) -> None:
        """Have the next look begin at once, and list the jobs: something was done to the cluster."""
        with self._lock:
            self._again_at = self._jobs_at = 0.0

    def close(self) -> None:
        """Give the thread back; a look that is under way ends by itself."""
        self._threads.shutdown(wait=False)

    def _try(self, connect: Connect) -> None:
        try:
            with closing(connect()) as jobs:
                seen = self._see(jobs)
        except Exception as error:
            if not isinstance(error, RayLMError):
                log.exception("a look at a Ray cluster failed")
            self._failed(error)
        else:
            with self._lock:
                self.seen, self._pause, self._again_at = seen, SILENT_FOR_S[0], time.monotonic() + KEPT_S

    def _failed(self, error: Exception) -> None:
        state = "refused" if isinstance(error, Refused) else "silent" if isinstance(error, Unreachable) else "broken"
        # What another library says may quote what only the cluster may know.
        words = str(error) if isinstance(error, RayLMError) else f"{type(error).__name__}; see the API server's log."
        old = self.seen
        with self._lock:
            self.seen = Look(old.at, old.engines, old.jobs, old.histories, old.dashboard_url, words, state)
            self._again_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, SILENT_FOR_S[1])

    def _see(self, jobs: RayJobs) -> Look:
        engines = jobs.all_engines()
        began = time.monotonic()
        if began >= self._jobs_at:
            self._jobs = jobs.all_jobs()
            ended = time.monotonic()
            self._jobs_at = ended + min(JOBS_PAUSE * (ended - began), JOBS_KEPT_S)
        there = {engine.ref.application for engine in engines}
        # Of thousands that Ray remembers, which every answer to a viewer would go through.
        theirs = tuple(job for job in self._jobs if job.application in there)
        at_work = [job for job in theirs if job.verb == "infer" and is_at_work(job)]
        self._read_tails(jobs, [job.submission_id for job in at_work if job.info.started])
        return Look(time.time(), engines, theirs, dict(self._histories), jobs.dashboard_url, "", "ok")

    def _read_tails(self, jobs: RayJobs, names: Collection[str]) -> None:
        """Read the ends of some logs; one that cannot be read is left for the next look."""
        self._histories = {name: self._histories.get(name, ()) for name in names}
        self._read_at = {name: self._read_at.get(name, 0.0) for name in names}

        def read(name: str) -> None:
            known = self._histories[name]
            self._read_at[name] = time.monotonic()
            try:
                told = progress_in(jobs.logs(name, NEXT_LINES if known else FIRST_LINES))
            except RayLMError as error:
                log.warning("the log of Ray job %s cannot be read: %s", name, error)
                return
            new = tuple(record for record in told if not known or record.at > known[-1].at)
            history = (known + new)[-HISTORY:]
            # The first failed rows are those of the last record: all before it have the same, or fewer.
            self._histories[name] = (*map(_without_rows, history[:-1]), *history[-1:])

        with ThreadPoolExecutor(TAILS_AT_A_TIME, thread_name_prefix="raylm-engines-page-log") as threads:
            list(threads.map(read, sorted(names, key=self._read_at.__getitem__)[:TAILS]))


def _without_rows(record: Progress) -> Progress:
    return record.model_copy(update={"failed_rows": ()}) if record.failed_rows else record


def is_at_work(job: SeenJob) -> bool:
    """Return whether a job has not ended."""
    return job.info.status not in TERMINAL


class Watch:
    """All connections' clusters."""

    def __init__(self) -> None:
        self._clusters: dict[str, Cluster] = {}

    def cluster(self, conn_id: str) -> Cluster:
        """Return a connection's cluster."""
        return self._clusters.setdefault(conn_id, Cluster())

    async def looks(self, connects: Mapping[str, Connect]) -> dict[str, Look]:
        """Return what each connection's cluster has shown, after waiting for those that are asked now; not for long.

        Args:
            connects: how to open a client, by the connection's id.
        """
        # Held here: while this waits, another viewer may find that a connection was deleted.
        clusters = {conn_id: self.cluster(conn_id) for conn_id in connects}
        pending = {conn_id: cluster.look(connects[conn_id]) for conn_id, cluster in clusters.items()}
        # Whoever did not answer the last time is not waited for.
        hopeful = (look for conn_id, look in pending.items() if clusters[conn_id].seen.state in ("ok", "looking"))
        waits = [asyncio.wrap_future(look) for look in hopeful if look is not None]
        if waits:
            await asyncio.wait(waits, timeout=ANSWER_S)
        return {conn_id: cluster.seen for conn_id, cluster in clusters.items()}

    def keep(self, conn_ids: Collection[str]) -> None:
        """Forget the connections that are not among *conn_ids*: they were deleted."""
        for conn_id in set(self._clusters) - set(conn_ids):
            self._clusters.pop(conn_id).close()
