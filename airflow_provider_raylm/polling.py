"""What to do after one look at a Ray job. Pure: no clock, no network; the same for a waiting worker and a trigger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from airflow_provider_raylm.errors import ClusterError

SUCCEEDED = "SUCCEEDED"
FAILED = "FAILED"
STOPPED = "STOPPED"
TERMINAL = frozenset({SUCCEEDED, FAILED, STOPPED})


class Unreachable(ClusterError):
    """The cluster did not answer this time; it may answer the next time."""


@dataclass(frozen=True)
class JobInfo:
    """A Ray job as the dashboard shows it.

    Attributes:
        status: PENDING, RUNNING, or one of ``TERMINAL``.
        message: Ray's own sentence about the status.
        metadata: what its JobRequest had.
    """

    status: str
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Watch:
    """How long to keep looking, and since when the cluster has been silent. Times are Unix seconds.

    Attributes:
        deadline: when the task's own time is over; None for no bound.
        outage_limit: seconds of silence after which the job counts as lost.
        silent_since: first failure of the present silence; None while the cluster answers.
    """

    deadline: float | None = None
    outage_limit: float = 300.0
    silent_since: float | None = None


@dataclass(frozen=True)
class Wait:
    """Look again later, with this watch."""

    watch: Watch


@dataclass(frozen=True)
class Ended:
    """The job reached a terminal status."""

    job: JobInfo


@dataclass(frozen=True)
class Expired:
    """The deadline passed while the job was still going: stop it."""


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
            "it. Clear the deploy task together with this one."
        )
    if watch.deadline is not None and now >= watch.deadline:
        return Expired()
    if isinstance(seen, Unreachable):
        since = watch.silent_since if watch.silent_since is not None else now
        if now - since >= watch.outage_limit:
            return Lost(f"No answer from Ray for {now - since:.0f} s. {seen}")
        return Wait(replace(watch, silent_since=since))
    return Wait(replace(watch, silent_since=None))
