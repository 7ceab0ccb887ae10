"""What a cluster has of this package: its engines and its jobs, as the Ray dashboard lists them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from airflow_provider_raylm import __version__
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.naming import (
    APPLICATION_PREFIX,
    ENGINE_DEPLOYMENT,
    answers_fingerprint,
    application_name,
    fingerprint,
)
from airflow_provider_raylm.polling import STATUSES, JobInfo
from airflow_provider_raylm.specs import EngineRef, EngineSpec, Labels, build

RUNNING = "RUNNING"


@dataclass(frozen=True)
class SeenEngine:
    """An engine that is there, well or not.

    Attributes:
        ref: what its deployment says of it.
        status: Serve's word for it: RUNNING, DEPLOYING, UNHEALTHY, DELETING, DEPLOY_FAILED.
        message: Serve's own sentence about the status.
        wanted: replicas that it shall have now.
        started_at: Unix seconds at which each of its live replicas was started.
        running: those of them that can take work.
        autoscales: whether the number of replicas changes by itself.
        foreign: whether another version deployed it, and says what this one does not understand: no task works on it.
    """

    ref: EngineRef
    status: str
    message: str = ""
    wanted: int = 0
    started_at: tuple[float, ...] = ()
    running: int = 0
    autoscales: bool = False
    foreign: bool = False


@dataclass(frozen=True)
class SeenJob:
    """A job of this package.

    Attributes:
        submission_id: its id.
        info: how it stands.
        ended_at: Unix seconds, by the cluster's clock; None while it has not ended.
    """

    submission_id: str
    info: JobInfo
    ended_at: float | None = None

    @property
    def verb(self) -> str:
        """What it does: deploy, infer, teardown or sweep."""
        return self.submission_id.removeprefix(APPLICATION_PREFIX).partition("-")[0]

    @property
    def application(self) -> str | None:
        """The engine that it concerns."""
        return self.info.metadata.get("application")


def reference(spec: EngineSpec, labels: Labels, deployed_at: float) -> EngineRef:
    """Return how an engine that is deployed at *deployed_at* (Unix seconds) is referred to."""
    return EngineRef(
        application=application_name(labels),
        deployment=ENGINE_DEPLOYMENT,
        model=spec.effective_model_name,
        fingerprint=fingerprint(spec),
        answers=answers_fingerprint(spec),
        version=__version__,
        labels=labels,
        lease=spec.lease,
        task=spec.task,
        media=spec.media,
        replicas=spec.max_replicas,
        gpus_per_replica=spec.gpus_per_worker * spec.workers,
        runtime_env=spec.runtime_env,
        deployed_at=deployed_at,
    )


def engines_in(applications: Mapping[str, Any], dashboard_url: str) -> tuple[SeenEngine, ...]:
    """Return the engines of this package among Serve's *applications*, as its REST API describes them.

    One that does not say even whose it is, is left out.

    Raises:
        LookupError, TypeError, AttributeError: Serve's REST API describes nothing so.
    """
    found = []
    for name, application in applications.items():
        if not name.startswith(APPLICATION_PREFIX):
            continue
        deployments = application["deployments"]
        for deployment in deployments.values():
            about = {**(deployment["deployment_config"].get("user_config") or {}), "dashboard_url": dashboard_url}
            with suppress(SpecError):
                ref, foreign = _understood({**about, "application": name})
                found.append(_seen(ref, application, deployments.get(ref.deployment) or {}, foreign))
    return tuple(found)


def _understood(about: Mapping[str, Any]) -> tuple[EngineRef, bool]:
    try:
        return build(EngineRef, about), False
    except SpecError:
        return build(EngineRef, {name: value for name, value in about.items() if name in EngineRef.model_fields}), True


def _seen(ref: EngineRef, application: Mapping[str, Any], engine: Mapping[str, Any], foreign: bool) -> SeenEngine:
    replicas = engine.get("replicas") or []
    return SeenEngine(
        ref,
        application["status"],
        # Of what has not started the deployment says more.
        (engine.get("message") or application.get("message") or "").strip(),
        engine.get("target_num_replicas") or 0,
        tuple(one["start_time_s"] for one in replicas if one.get("start_time_s")),
        sum(one.get("state") == RUNNING for one in replicas),
        bool((engine.get("deployment_config") or {}).get("autoscaling_config")),
        foreign,
    )


def jobs_in(listed: Sequence[Mapping[str, Any]]) -> tuple[SeenJob, ...]:
    """Return the jobs of this package among those that the Jobs REST API lists.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it lists nothing so.
    """
    if not isinstance(listed, list):
        raise TypeError(f"expected a list, got {type(listed).__name__}")
    return tuple(
        SeenJob(one["submission_id"], job_info(one), _seconds(one.get("end_time")))
        for one in listed
        if str(one.get("submission_id") or "").startswith(APPLICATION_PREFIX)
    )


def job_info(job: Mapping[str, Any]) -> JobInfo:
    """Return a job as the Jobs REST API describes it.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it describes none so.
    """
    status = job["status"]
    if status not in STATUSES:
        raise ValueError(f"{status!r} is no status of a Ray job")
    return JobInfo(
        status,
        job.get("message") or "",
        dict(job.get("metadata") or {}),
        # Ray's start is when the job was handed in. A job that has run has a node.
        submitted_at=_seconds(job.get("start_time")),
        started=bool(job.get("driver_node_id", True)),
    )


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
