"""Calls to an engine's lease, which knows who works on it and how it spent its time."""

from __future__ import annotations

from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any
from uuid import uuid4

from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from airflow_provider_raylm.cluster.engine import applications
from airflow_provider_raylm.cluster.engine.status import last_line
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.naming import LEASE_DEPLOYMENT
from airflow_provider_raylm.specs import BatchReport, EngineInfo, EngineRef, Labels, build

LEASE_CALL_TIMEOUT_S = 20.0
# This process: another attempt may wait until this one has written, and is at work when this one is not any more.
_ATTEMPT = uuid4().hex

# An engine in another state can take no work, or does not any more.
_MAY_WORK = (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY, ApplicationStatus.DEPLOYING)
_leases: dict[str, Any] = {}


class SilentLease(Exception):
    """An engine's lease did not answer: its node is lost or busy, or Serve is being restarted. It may answer again."""


def renew(application: str, output: str | None = None) -> tuple[str, ...]:
    """Renew the lease, for the task that writes *output*, and return the outputs of all tasks at work.

    An engine that is not there, or has no lease, has nothing to renew.

    Raises:
        SilentLease: it did not get through.
    """
    return tuple(_ask_lease(application, "renew", output, _ATTEMPT) or ())


def awaited(application: str) -> None:
    """Say that somebody waits until the engine is up.

    Raises:
        SilentLease: it did not get through.
    """
    _ask_lease(application, "awaited")


def release(application: str, output: str) -> None:
    """Say that the task that writes *output* has ended; if that does not get through, its silence will."""
    with suppress(SilentLease):
        _ask_lease(application, "release", output, _ATTEMPT)


def record(application: str, report: BatchReport) -> None:
    """Add a task's report to the engine's usage; losing it costs a figure, not a row."""
    with suppress(SilentLease):
        _ask_lease(application, "record", report.model_dump(mode="json"))


def working(application: str) -> tuple[str, ...] | None:
    """Return the outputs of the tasks at work on an engine; None when it is there and its lease does not say.

    Nobody works on an engine that is not there, is going, has no lease, or has failed to start.
    """
    status = applications.status_of(application)
    if status is None or applications.fingerprint_of(status) is None:
        return ()
    try:
        about = _ask_lease(application, "describe")
    except SilentLease:
        return None if status.status in _MAY_WORK else ()
    return tuple(about["working"]) if about else ()


def describe(application: str) -> EngineInfo | None:
    """Return an engine as its lease describes it, or None when it is not there or not this provider's.

    Of one whose lease does not answer, the labels are those that Serve keeps; age and who works are None.
    """
    status = applications.status_of(application)
    mark = status and applications.fingerprint_of(status)
    if status is None or mark is None:
        return None
    try:
        about = _ask_lease(application, "describe")
    except SilentLease:
        labels = _labels_in_serve(application)
        about = labels and {"labels": labels, "age_seconds": None, "working": None}
    if not about:
        return None
    return EngineInfo(application=application, status=status.status.value, fingerprint=mark, **about)


def _labels_in_serve(application: str) -> Labels | None:
    """Return whose engine it is by the reference that its lease was deployed with; None if there is none to be read."""
    details = _get_global_client().get_serve_details()["applications"].get(application)
    for name, deployment in (details or {"deployments": {}})["deployments"].items():
        if name.startswith(f"{LEASE_DEPLOYMENT}-"):
            # Another version may have deployed it, with what this one does not understand.
            with suppress(SpecError):
                return build(EngineRef, deployment["deployment_config"].get("user_config")).labels
    return None


def _ask_lease(application: str, method: str, *arguments: Any) -> Any:
    """Return what the lease answers; None when there is no lease.

    The handle of one that answered is kept: it needs no controller, which may be restarting when the lease is to be
    renewed.

    Raises:
        SilentLease: it did not answer.
    """
    lease = _leases.get(application)
    try:
        if lease is None:
            lease = _find_lease(application)
        answer = _answer(getattr(lease, method).remote(*arguments)) if lease is not None else None
    except (RayError, RayServeException, TimeoutError, CancelledError) as error:
        _leases.pop(application, None)
        why = last_line(str(error)) or type(error).__name__
        raise SilentLease(f"the lease of {application} does not answer: {why}") from error
    if lease is not None:
        _leases[application] = lease
    return answer


def _find_lease(application: str) -> Any:
    status = applications.status_of(application)
    mark = status and applications.fingerprint_of(status)
    if not mark:
        return None
    # KeyError: it has gone in this moment.
    with suppress(KeyError):
        return serve.get_deployment_handle(f"{LEASE_DEPLOYMENT}-{mark}", application)
    return None


def _answer(response: Any) -> Any:
    try:
        return response.result(timeout_s=LEASE_CALL_TIMEOUT_S)
    except TimeoutError:
        # Serve keeps a call that no replica has for ever.
        response.cancel()
        raise TimeoutError(f"no answer within {LEASE_CALL_TIMEOUT_S:g} s") from None
