"""Delete engines: the one that a run is done with, and those that outlived theirs."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray import serve
from ray.serve.schema import ApplicationStatus

from airflow_provider_raylm.cluster.engine import applications, leases
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.naming import APPLICATION_PREFIX
from airflow_provider_raylm.specs import EngineSeconds, EngineUsage, OnBusy, SweepReport, TeardownReport

DELETE_TIMEOUT_S = 300.0

Say = Callable[[str], None]


def teardown(application: str, say: Say, on_busy: OnBusy = "delete", drain_timeout: float = 0) -> TeardownReport:
    """Delete one engine and wait until it is gone and what it held is free. Missing already is success.

    Args:
        application: the engine.
        say: receives progress lines.
        on_busy: what to do while tasks work on it.
        drain_timeout: seconds to wait for them at most, with "wait"; then it is deleted under them.

    Raises:
        EngineError: tasks work on it, with "fail"; or it is still there after five minutes.
    """
    if applications.status_of(application) is None:
        say(f"engine {application} is not there: nothing to do")
        return TeardownReport(application=application, existed=False, resources_free=applications.is_free(application))
    if on_busy != "delete":
        _drain(application, drain_timeout if on_busy == "wait" else 0, on_busy == "fail", say)
    info = leases.describe(application)
    serve.delete(application, _blocking=False)
    if not applications.wait_until_absent(application, DELETE_TIMEOUT_S):
        raise EngineError(
            f"{application} is still there {DELETE_TIMEOUT_S:.0f} s after its deletion was asked for. Run the teardown "
            "again; if that does not help, look at the Serve controller's log."
        )
    say(f"engine {application} is deleted")
    return TeardownReport(
        application=application,
        existed=True,
        engine_seconds=round(info.age_seconds or 0.0, 3) if info else 0.0,
        usage=info.usage if info else EngineUsage(),
        spent=info.spent if info else EngineSeconds(),
        resources_free=applications.is_free(application),
    )


def _drain(application: str, timeout: float, refuse: bool, say: Say) -> None:
    end = time.monotonic() + timeout
    said = ""
    while (tasks := leases.working(application)) != ():
        if tasks is None:
            who, over = f"the lease of {application} does not answer: it is not known who works on it", "it does"
        else:
            who, over = f"{application} is at work on {', '.join(tasks)}", "it is done"
        if refuse:
            raise EngineError(f"{who}. Run the teardown again when {over}, or with another on_busy.")
        if time.monotonic() >= end:
            say(f"{who} after {timeout:g} s (drain_timeout): deleting it")
            return
        if who != said:
            say(f"{who}: waiting until {over}, at most {timeout:g} s (drain_timeout)")
            said = who
        time.sleep(applications.POLL_PERIOD_S)


def sweep(delete: tuple[str, ...], max_age: float | None, installation: str, say: Say) -> SweepReport:
    """List this installation's engines and delete those that are named, or older than *max_age* seconds.

    An application without this provider's labels, or with another installation's, is left alone. One whose lease does
    not answer is known by the labels that Serve keeps, and its age is not: it is deleted by name only.
    """
    found = []
    for name, status in sorted(applications.every().items()):
        if not name.startswith(APPLICATION_PREFIX) or not applications.fingerprint_of(status):
            continue
        # One that is going is no engine any more, though it may take a while; named, it is waited for.
        if status.status == ApplicationStatus.DELETING and name not in delete:
            continue
        info = leases.describe(name)
        if info is None:
            say(f"the lease of {name} does not answer, and Serve does not say whose engine it is: it is left alone")
        if info is None or info.labels.installation != installation:
            continue
        if info.age_seconds is None:
            say(f"the lease of {name} does not answer: its age is not known, so it does not count as too old")
        found.append(info)
    over = [
        info.application
        for info in found
        if info.application in delete or (max_age is not None and (info.age_seconds or 0.0) > max_age)
    ]
    for name in over:
        teardown(name, say)
    return SweepReport(engines=tuple(found), deleted=tuple(over))
