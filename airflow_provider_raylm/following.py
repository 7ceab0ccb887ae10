"""Bring a Ray job about and follow it to its end, from a waiting worker."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.polling import SUCCEEDED, TERMINAL, Ended, JobInfo, Lost, Unreachable, Wait, Watch, decide
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobs
from airflow_provider_raylm.wire import SAID, outcome

STOP_TIMEOUT_S = 60.0
STOP_PERIOD_S = 0.5

Say = Callable[[str], None]


class Stopped(ClusterError):
    """The job was stopped before its end: by the user, or because the task was told to end."""


def submit_or_attach(jobs: RayJobs, request: Callable[[int], JobRequest], say: Say, take_result: bool = False) -> str:
    """Return the submission id of the job to follow: the one that is running for this task, else a new one.

    A job with other metadata is of before the task was cleared: it is stopped, if it still runs.

    Args:
        jobs: the cluster.
        request: makes the request of the n-th attempt; equal but for the id.
        say: receives a line about what was done.
        take_result: rather than a new job take the last one, if that has succeeded and nobody had its result.

    Raises:
        ClusterError: an old job does not stop.
    """
    succeeded = None
    for attempt in itertools.count(1):
        candidate = request(attempt)
        name = candidate.submission_id
        job = jobs.get(name)
        current = job is not None and job.metadata == candidate.metadata
        if job is not None and job.status in TERMINAL:
            succeeded = name if current and job.status == SUCCEEDED else None
            continue
        if job is not None and not current:
            say(f"stopping Ray job {name}, which runs since before the task was cleared")
            _stop(jobs, name)
            continue
        if job is None and succeeded is not None and take_result:
            say(f"Ray job {succeeded} has succeeded already, for an attempt that did not live to see it")
            return succeeded
        if job is None and jobs.submit(candidate):
            say(f"submitted Ray job {name} to {jobs.dashboard_url}")
        else:
            say(f"attached to Ray job {name}, which is running already")
        return name
    raise AssertionError("unreachable")


def _stop(jobs: RayJobs, submission_id: str) -> None:
    """Stop a job and wait until it has ended: Ray kills it after three seconds."""
    jobs.stop(submission_id)
    end = time.monotonic() + STOP_TIMEOUT_S
    while (job := jobs.get(submission_id)) is not None and job.status not in TERMINAL:
        if time.monotonic() >= end:
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
    """

    jobs: RayJobs
    submission_id: str
    say: Say
    interval: float
    _seen: int = 0
    _told_to_end: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Stop the job and make ``wait`` raise. Safe in a signal handler."""
        self._told_to_end.set()
        self.jobs.stop(self.submission_id)

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
            ClusterError: the job was lost, or *watch*'s deadline passed (the job is stopped then).
        """
        try:
            job = self.jobs.get(self.submission_id)
            self._forward()
            decision = decide(watch, job, time.time())
            if isinstance(decision, Ended):
                return self._result(decision.job)
        except Unreachable as error:
            decision = decide(watch, error, time.time())
        if isinstance(decision, Wait):
            return decision.watch
        if isinstance(decision, Lost):
            raise ClusterError(decision.reason)
        self.jobs.stop(self.submission_id)
        raise ClusterError(f"Ray job {self.submission_id} was not done in time; it was told to stop.")

    def skip(self) -> None:
        """Leave out the lines that there are: somebody else has handed them on."""
        self._seen = len(self.jobs.logs(self.submission_id))

    def _forward(self) -> None:
        """Hand on the lines that are complete and were not handed on before."""
        new = self.jobs.logs(self.submission_id, self._seen)
        complete = new[: new.rfind("\n") + 1]
        self._seen += len(complete)
        for line in complete.splitlines():
            if line.startswith(SAID):
                self.say(line.removeprefix(SAID))

    def _result(self, job: JobInfo) -> dict[str, Any]:
        if job.status == "STOPPED":
            raise Stopped(f"Ray job {self.submission_id} was stopped: {job.message}")
        # The log may trail the status.
        self._forward()
        return outcome(self.jobs.logs(self.submission_id), job.message)
