"""One verb on a cluster for a command: as a Ray job that ends with the command, however that ends."""

from __future__ import annotations

import getpass
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from airflow_provider_raylm.cli.console import complain
from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.following import Follower, Stopped
from airflow_provider_raylm.packages import Packed
from airflow_provider_raylm.polling import TERMINAL, Watch
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobs

POLL_INTERVAL_S = 1.0


def run_verb(
    jobs: RayJobs,
    verb: str,
    payload: Mapping[str, Any],
    *,
    timeout: float,
    task: Mapping[str, str] | None = None,
    environment: Packed | None = None,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    pad: bytes = b"",
) -> dict[str, Any]:
    """Run a verb and return its result; what the job says goes to stderr.

    Args:
        jobs: the cluster.
        verb: what to do.
        payload: its arguments.
        timeout: seconds after which the job is stopped.
        task: dag_id and task_id of the task that it concerns, or the application of an engine, for who looks on.
        environment: what the job finds beside the image.
        storage: options of fsspec's file systems, by protocol.
        pad: seals rows that the job reports.

    Raises:
        RayLMError: what the cluster reported, or why it could not.
    """
    application = payload.get("application") or payload.get("engine", {}).get("application")
    request = JobRequest(
        # A command is nobody's retry: it never attaches.
        f"raylm-{verb}-cli-{secrets.token_hex(6)}",
        verb,
        payload,
        {
            "command": f"raylm {verb}",
            "user": _user(),
            # By which the engines page finds the jobs of an engine.
            **({"application": application} if application else {}),
            **(task or {}),
        },
        environment or Packed(),
        storage or {},
        pad,
    )
    jobs.submit(request)
    follower = Follower(jobs, request.submission_id, complain, POLL_INTERVAL_S)
    try:
        return follower.wait(Watch(deadline=time.time() + timeout))
    except Stopped:
        raise
    except BaseException:
        # Interrupted, or lost from sight: a job that nobody waits for must not continue.
        if not _has_ended(jobs, request.submission_id):
            complain(f"stopping Ray job {request.submission_id}")
            with suppress(ClusterError):
                follower.end()
        raise


def _has_ended(jobs: RayJobs, submission_id: str) -> bool:
    with suppress(ClusterError):
        job = jobs.get(submission_id)
        return job is None or job.status in TERMINAL
    return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
