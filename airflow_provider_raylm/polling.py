"""What to do after one look at a Ray job. Pure: no clock, no network; the same for a waiting worker and a trigger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from airflow_provider_raylm.errors import ClusterError, SpecError

PENDING = "PENDING"
SUCCEEDED = "SUCCEEDED"
FAILED = "FAILED"
STOPPED = "STOPPED"
TERMINAL = frozenset({SUCCEEDED, FAILED, STOPPED})
STATUSES = TERMINAL | {PENDING, "RUNNING"}

# Ray itself fails a job after RAY_JOB_START_TIMEOUT_SECONDS, of the head's environment: 900 unless it is set.
PENDING_TIMEOUT_S = 1800.0
# Every job is pending for some seconds, which are not worth a line.
PENDING_SAID_AFTER_S = 15.0
SAY_PERIOD_S = 60.0
# Seconds of silence after which a job counts as lost: a dashboard that is restarted is back by then.
OUTAGE_LIMIT_S = 300.0


def require_seconds(field: str, value: object, from_zero: bool = False) -> None:
    """Refuse what is no time to wait.

    Args:
        field: what it is given for.
        value: the seconds.
        from_zero: whether it may be 0.

    Raises:
        SpecError: it is text, negative, or not a number.
    """
    if not isinstance(value, int | float) or not (value > 0 or (from_zero and value == 0)):
        least = "of 0 or more" if from_zero else "above 0"
        raise SpecError(f"{field}: {value!r} is no number of seconds {least}")


class Unreachable(ClusterError):
    """The cluster did not answer this time; it may answer the next time."""


class Refused(ClusterError):
    """The cluster does not accept the token; it may accept another one."""


@dataclass(frozen=True)
class JobInfo:
    """A Ray job as the dashboard shows it.

    Attributes:
        status: PENDING, RUNNING, or one of ``TERMINAL``.
        message: Ray's own sentence about the status.
        metadata: what its JobRequest had.
        submitted_at: Unix seconds, by the cluster's clock; None when it is not told.
        started: whether it has ever run.
    """

    status: str
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    submitted_at: float | None = None
    started: bool = True

    def pending_s(self, now: float) -> float:
        """Return for how many seconds the job has been waiting to start; 0 once it has."""
        waits = self.status == PENDING and self.submitted_at is not None
        return max(now - (self.submitted_at or 0.0), 0.0) if waits else 0.0


@dataclass(frozen=True)
class Watch:
    """How long to keep looking, and since when the cluster has been silent. Times are Unix seconds.

    Attributes:
        deadline: when the task's own time is over; None for no bound.
        outage_limit: seconds of silence after which the job counts as lost.
        silent_since: first failure of the present silence; None while the cluster answers.
        pending_timeout: seconds that a job may wait to start.
        said: what was told of a job that waits to start; empty when nothing was.
        said_at: when.
    """

    deadline: float | None = None
    outage_limit: float = OUTAGE_LIMIT_S
    silent_since: float | None = None
    pending_timeout: float = PENDING_TIMEOUT_S
    said: str = ""
    said_at: float = 0.0


@dataclass(frozen=True)
class Wait:
    """Look again later, with this watch; ``news`` of the job is for the task's log, and mostly empty."""

    watch: Watch
    news: str = ""


@dataclass(frozen=True)
class Ended:
    """The job reached a terminal status."""

    job: JobInfo


@dataclass(frozen=True)
class Expired:
    """The job takes too long, as ``reason`` says of it: stop it."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The job cannot be followed any more; ``reason`` says why and what to do."""

    reason: str


Decision = Wait | Ended | Expired | Lost


def decide(watch: Watch, seen: JobInfo | Unreachable | None, now: float) -> Decision:
    """Return what one look means.

    Args:
        watch: the state of the watch before this look.
        seen: the job; None when the cluster answered that there is no such job; Unreachable when it did not answer.
            Silence is not absence.
        now: Unix seconds.
    """
    if isinstance(seen, JobInfo) and seen.status in TERMINAL:
        return Ended(seen)
    if seen is None:
        return Lost(
            "Ray does not know the job any more: the head node was probably restarted, and the engine is gone with "
            "it. A retry submits the job anew; where that finds no engine, clear the deploy task together with this "
            "one."
        )
    if watch.deadline is not None and now >= watch.deadline:
        return Expired("was not done in time; it was told to stop.")
    if isinstance(seen, Unreachable):
        since = watch.silent_since if watch.silent_since is not None else now
        if now - since >= watch.outage_limit:
            return Lost(f"No answer from Ray for {now - since:.0f} s. {seen}")
        return Wait(replace(watch, silent_since=since))
    if is_overdue(seen, watch.pending_timeout, now):
        return Expired(
            f"has not started within pending_timeout ({watch.pending_timeout:g} s); it was told to stop. Ray says: "
            f"{seen.message} Look at the head node, and whether the job's runtime environment can be made there; then "
            "retry. Where it takes longer, raise pending_timeout, and RAY_JOB_START_TIMEOUT_SECONDS on the head node."
        )
    return _wait(replace(watch, silent_since=None), seen, now)


def is_overdue(job: JobInfo, pending_timeout: float, now: float) -> bool:
    """Return whether the job should have started by now. *now*: Unix seconds."""
    return job.pending_s(now) >= pending_timeout


def _wait(watch: Watch, job: JobInfo, now: float) -> Wait:
    if job.status != PENDING:
        return Wait(replace(watch, said="", said_at=0.0), "has started" if watch.said else "")
    pending = job.pending_s(now)
    same = job.message == watch.said
    if pending < PENDING_SAID_AFTER_S or (same and now - watch.said_at < SAY_PERIOD_S):
        return Wait(watch)
    news = f"waits to start, for {pending:.0f} s so far: {job.message}"
    return Wait(replace(watch, said=job.message, said_at=now), news)
