"""What Serve says of the applications on the cluster."""

from __future__ import annotations

import time

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState
from ray.util import placement_group_table

from airflow_provider_raylm.naming import ENGINE_DEPLOYMENT, LEASE_DEPLOYMENT

POLL_PERIOD_S = 1.0
# Serve's controller makes an application's deployments at its next look, which a busy machine delays.
DEPLOYMENTS_TIMEOUT_S = 60.0


def every() -> dict[str, ApplicationStatusOverview]:
    """Return all applications by name, whoever's they are."""
    return dict(serve.status().applications)


def status_of(name: str) -> ApplicationStatusOverview | None:
    """Return an application's status, or None when it is not there."""
    return every().get(name)


def settled_status_of(name: str) -> ApplicationStatusOverview | None:
    """Return an application's status once it has deployments: for a moment after it was created it has none.

    One that never gets any, because it could not be built, is returned without them.
    """
    end = time.monotonic() + DEPLOYMENTS_TIMEOUT_S
    while (status := status_of(name)) is not None:
        if status.deployments or status.status != ApplicationStatus.DEPLOYING or time.monotonic() >= end:
            break
        time.sleep(POLL_PERIOD_S / 2)
    return status


def fingerprint_of(status: ApplicationStatusOverview) -> str | None:
    """Return the fingerprint of the spec that it was deployed from; None when it is no engine of this provider's."""
    names = [str(name) for name in status.deployments if name.startswith(f"{LEASE_DEPLOYMENT}-")]
    return names[0].removeprefix(f"{LEASE_DEPLOYMENT}-") if names else None


def engine_message(status: ApplicationStatusOverview) -> str:
    """Return what Serve says of the engine's own deployment, or else of the application."""
    engine = status.deployments.get(ENGINE_DEPLOYMENT)
    return (engine.message if engine and engine.message else status.message) or ""


def show_states(status: ApplicationStatusOverview) -> str:
    """Return for people how many replicas are in which state."""
    engine = status.deployments.get(ENGINE_DEPLOYMENT)
    states = engine.replica_states if engine else {}
    counts = [f"{count} replicas {ReplicaState(state).value.lower()}" for state, count in states.items() if count]
    return ", ".join(counts) or status.status.value.lower()


def wait_until_absent(name: str, timeout: float) -> bool:
    """Wait until the application and its placement groups are gone; return whether they are."""
    end = time.monotonic() + timeout
    while status_of(name) is not None or not is_free(name):
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_PERIOD_S / 2)
    return True


def is_free(name: str) -> bool:
    """Return whether no placement group of the application's replicas is left."""
    mine = f"SERVE_REPLICA::{name}#"
    return not any(
        group["name"].startswith(mine) and group["state"] != "REMOVED" for group in placement_group_table().values()
    )
