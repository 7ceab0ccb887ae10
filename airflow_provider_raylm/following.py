"""Bring a Ray job about and follow it to its end, from a waiting worker."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.polling import (
    FAILED,
    OUTAGE_LIMIT_S,
    PENDING,
    PENDING_TIMEOUT_S,
    SUCCEEDED,
    TERMINAL,
    Ended,
    Expired,
    JobInfo,
    Lost,
    Unreachable,
    Wait,
    Watch,
    decide,
    is_overdue,
)
from airflow_provider_raylm.ray_jobs import FollowedJobs, JobRequest, RayJobs
from airflow_provider_raylm.specs import Progress
from airflow_provider_raylm.wire import has_outcome, outcome, progress_in, said

# Of a log that grows; what a job says between two looks, with the noise around it, and then what it has ever said.
LOOK_LINES = (40, 1000, None)
# A job's outcome is its last line but for what libraries say when it ends.
LAST_LINES = 200
STOP_TIMEOUT_S = 60.0
STOP_PERIOD_S = 0.5
RETRY_PERIOD_S = 1.0
# From a task's own process. One that is told to end has less: Airflow kills it after five seconds.
STOP_OUTAGE_LIMIT_S = 40.0

Say = Callable[[str], None]
Result = TypeVar("Result")


class Stopped(ClusterError):
    """The job was stopped before its end: by the user, or because the task was told to end."""


def patiently(
    call: Callable[[], Result],
    say: Say,
    limit: float = OUTAGE_LIMIT_S,
    pause: Callable[[float], object] = time.sleep,
) -> Result:
    """Return what *call* returns, trying again while the cluster is silent. Ids make that safe for whatever it asks.

    Args:
        call: one request.
        say: receives a line when the silence begins, and one when it is over.
        limit: seconds of silence that are borne.
        pause: waits for some seconds; what it raises ends this.

    Raises:
        Unreachable: the silence was longer.
    """
    since = None
    while True:
        try:
            result = call()
        except Unreachable as error:
            now = time.monotonic()
            if since is None:
                since = now
                say(f"{error} Trying again for {limit:g} s.")
            if now - since >= limit:
                raise
            pause(RETRY_PERIOD_S)
        else:
            if since is not None:
                say(f"an answer again after {time.monotonic() - since:.0f} s")
            return result


def submit_or_attach(
    jobs: RayJobs,
    request: Callable[[int], JobRequest],
    say: Say,
    take_result: bool = False,
    pending_timeout: float = PENDING_TIMEOUT_S,
    pause: Callable[[float], object] = time.sleep,
) -> str:
    """Return the submission id of the job to follow: the one that is running for this task, else a new one.

    A job with other metadata is from before the task was cleared: it is stopped, if it still runs. One that has not
    started in time is told to stop, and left behind: Ray stops it when it starts, and no sooner. A silent cluster is
    borne, as while a job is followed.

    Args:
        jobs: the cluster.
        request: makes the request of the n-th attempt; equal but for the id.
        say: receives a line about what was done.
        take_result: rather than a new job take the last one, if that has succeeded and nobody had its result.
        pending_timeout: seconds that a job may wait to start.
        pause: waits for some seconds; what it raises ends this.

    Raises:
        ClusterError: an old job does not stop, or the cluster stays silent.
    """
    ask = partial(patiently, say=say, pause=pause)
    succeeded = None
    for attempt in itertools.count(1):
        candidate = request(attempt)
        name = candidate.submission_id
        job = ask(partial(jobs.get, name))
        current = job is not None and job.metadata == candidate.metadata
        if job is not None and job.status in TERMINAL:
            succeeded = name if current and job.status == SUCCEEDED else None
            continue
        if job is not None and _is_left(jobs, candidate, job, pending_timeout, say, ask):
            continue
        # Ray deletes logs, and with them results: then it is asked again, which finds what is done already.
        last = partial(jobs.logs, succeeded or "", LAST_LINES)
        if job is None and succeeded is not None and take_result and has_outcome(ask(last)):
            say(f"Ray job {succeeded} has succeeded already, for an attempt that did not live to see it")
            return succeeded
        if job is None and ask(partial(jobs.submit, candidate)):
            say(f"submitted Ray job {name} to {jobs.dashboard_url}")
        else:
            say(f"attached to Ray job {name}, which is running already")
        return name
    raise AssertionError("unreachable")


def _is_left(
    jobs: RayJobs,
    candidate: JobRequest,
    job: JobInfo,
    pending_timeout: float,
    say: Say,
    ask: Callable[[Callable[[], Any]], Any],
) -> bool:
    """Return whether a job is another's, or has not started in time; it is told to stop then, and not followed."""
    name = candidate.submission_id
    if job.metadata != candidate.metadata:
        say(f"stopping Ray job {name}, which runs since before the task was cleared")
        _stop(jobs, name, ask)
        return True
    if is_overdue(job, pending_timeout, time.time()):
        say(f"Ray job {name} has not started in time: it is told to stop, and left behind")
        ask(partial(jobs.stop, name))
        return True
    return False


def _stop(jobs: RayJobs, submission_id: str, ask: Callable[[Callable[[], Any]], Any]) -> None:
    """Stop a job and wait until it has ended: Ray kills it after three seconds, or when it starts."""
    ask(partial(jobs.stop, submission_id))
    end = time.monotonic() + STOP_TIMEOUT_S
    while (job := ask(partial(jobs.get, submission_id))) is not None and job.status not in TERMINAL:
        if time.monotonic() >= end:
            if job.status == PENDING:
                return
            raise ClusterError(
                f"Ray job {submission_id} still runs {STOP_TIMEOUT_S:g} s after it was told to stop. Look at it on the "
                f"dashboard ({jobs.dashboard_url}); then retry."
            )
        time.sleep(STOP_PERIOD_S)


@dataclass
class Follower:
    """Follows one job: forwards its lines, waits, and knows how to stop.

    Args:
        jobs: the cluster.
        submission_id: the job.
        say: receives each line that the job says.
        interval: seconds between two looks.
        measure: receives the job's progress when there is news of it.
    """

    jobs: FollowedJobs
    submission_id: str
    say: Say
    interval: float
    measure: Callable[[Progress], None] | None = None
    _seen: int = 0
    _measured: Progress | None = None
    _told_to_end: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Stop the job and make ``wait`` raise; a silent cluster is borne for a while. Safe in a signal handler.

        Raises:
            ClusterError: the cluster did not take it.
        """
        self._told_to_end.set()
        self._stop()

    def _stop(self) -> None:
        patiently(partial(self.jobs.stop, self.submission_id), self.say, STOP_OUTAGE_LIMIT_S)

    def wait(self, watch: Watch) -> dict[str, Any]:
        """Look until the job has ended and return its result.

        Raises:
            RayLMError: as ``step``.
            Stopped: ``end`` was called.
        """
        while True:
            seen = self.step(watch)
            if not isinstance(seen, Watch):
                return seen
            watch = seen
            if self._told_to_end.wait(self.interval):
                raise Stopped(f"The task was told to end; Ray job {self.submission_id} was told to stop.")

    def step(self, watch: Watch) -> dict[str, Any] | Watch:
        """Look once; return the job's result if it has ended, else the watch for the next look.

        Raises:
            RayLMError: what the job reported.
            Stopped: somebody stopped the job.
            ClusterError: the job was lost, or it takes longer than *watch* lets it (the job is stopped then).
        """
        try:
            job = self.jobs.get(self.submission_id)
            if job is not None and job.started:
                self._forward()
            decision = decide(watch, job, time.time())
            if isinstance(decision, Ended):
                return self._result(decision.job)
        except Unreachable as error:
            decision = decide(watch, error, time.time())
        if isinstance(decision, Wait):
            if decision.news:
                self.say(f"Ray job {self.submission_id} {decision.news}")
            return decision.watch
        if isinstance(decision, Expired):
            self._stop()
            raise ClusterError(f"Ray job {self.submission_id} {decision.reason}")
        if isinstance(decision, Lost):
            raise ClusterError(decision.reason)
        raise AssertionError("unreachable")

    def skip(self) -> None:
        """Leave out the lines that there are: somebody else has handed them on."""
        self._seen = max(said(self.jobs.logs(self.submission_id, LOOK_LINES[-2])), default=0)

    def _forward(self) -> None:
        """Hand on the lines that are complete and were not handed on before."""
        for lines in LOOK_LINES:
            log = self.jobs.logs(self.submission_id, lines)
            told = said(log)
            new = sorted(number for number in told if number > self._seen)
            # Else lines are missing before these: the end of the log was too short. One may be lost for good, where
            # two processes wrote at a time.
            if not new or new[0] == self._seen + 1:
                break
        for number in new:
            self.say(told[number])
            self._seen = number
        last = progress_in(log)[-1:]
        if self.measure is not None and last and last[0] != self._measured:
            self._measured = last[0]
            self.measure(last[0])

    def _result(self, job: JobInfo) -> dict[str, Any]:
        if job.status == "STOPPED":
            raise Stopped(f"Ray job {self.submission_id} was stopped: {job.message}")
        if job.status == FAILED and not job.started:
            raise ClusterError(f"Ray job {self.submission_id} could not be started. Ray says: {job.message}")
        # The log may trail the status.
        self._forward()
        end = self.jobs.logs(self.submission_id, LAST_LINES)
        return outcome(end if has_outcome(end) else self.jobs.logs(self.submission_id), job.message)
