"""From an Airflow connection to a Ray cluster."""

from __future__ import annotations

import asyncio
from typing import Any

from airflow.sdk import BaseHook, Connection
from pydantic import Field

from airflow_provider_raylm import local
from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.ray_jobs import RayJobs, RayJobsClient
from airflow_provider_raylm.specs import Value, build

DEFAULT_PORT = 8265
LOCAL_HOST = "local"


class Extra(Value):
    """What a raylm connection's extra may hold."""

    verify: bool = Field(True, description="Check the dashboard's certificate.")
    ca_cert: str | None = Field(None, description="File with the CA's certificate, on the worker.")
    headers: dict[str, str] = Field(default_factory=dict, description="Further HTTP headers.")
    ship_package: bool = Field(True, description="Send this package along with each job.")
    python: str = Field("python", description="Interpreter of the cluster's jobs.")
    namespace: str | None = Field(None, description="Ray namespace of the jobs, for row functions' named actors.")
    timeout: float = Field(30, gt=0, description="Seconds per HTTP request.")


class RayLMHook(BaseHook):
    """Talks to one Ray cluster through its dashboard; needs no ray on the worker.

    The connection's host, port (8265), schema (http or https) and password (the cluster's token) give the address;
    the extra is ``Extra``. ``raylm://local`` is a Ray head on this machine, started when none answers.

    Args:
        raylm_conn_id: the connection.
    """

    conn_name_attr = "raylm_conn_id"
    default_conn_name = "raylm_default"
    conn_type = "raylm"
    hook_name = "Ray LM"

    def __init__(self, raylm_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.raylm_conn_id = raylm_conn_id

    def get_conn(self) -> RayJobs:
        """Return a client of the connection's cluster; close it after use.

        Raises:
            SpecError: the connection's extra has an unknown or bad field.
            ClusterError: no host, an unreadable CA file, or the local cluster did not start.
        """
        return _client(self.get_connection(self.raylm_conn_id))

    async def aget_conn(self) -> RayJobs:
        """Do as ``get_conn`` without holding an event loop up."""
        return await asyncio.to_thread(_client, await self.aget_connection(self.raylm_conn_id))

    def test_connection(self) -> tuple[bool, str]:
        """Return whether the dashboard answers and accepts the token, and a sentence about it."""
        try:
            jobs = self.get_conn()
            return True, f"Ray {jobs.ray_version()} answers at {jobs.dashboard_url}"
        except (ClusterError, ValueError) as error:
            return False, str(error)


def _client(connection: Connection) -> RayJobsClient:
    # The form stores a field that was left empty as null.
    extra = build(Extra, {name: value for name, value in connection.extra_dejson.items() if value is not None})
    token = connection.password or None
    if connection.host == LOCAL_HOST:
        url = local.ensure_local_cluster(connection.port or DEFAULT_PORT)
        token = token or local.find_token()
    else:
        url = _address(connection)
    return RayJobsClient(
        url,
        token=token,
        headers=extra.headers,
        verify=extra.ca_cert if extra.verify and extra.ca_cert else extra.verify,
        ship_package=extra.ship_package,
        python=extra.python,
        namespace=extra.namespace,
        timeout=extra.timeout,
    )


def _address(connection: Connection) -> str:
    if not connection.host:
        raise ClusterError(
            f"The connection {connection.conn_id!r} has no host. Set it to the address of the Ray dashboard, or to "
            f"{LOCAL_HOST!r} for a cluster on this machine."
        )
    scheme = connection.schema or "http"
    if scheme not in ("http", "https"):
        raise ClusterError(f"The connection {connection.conn_id!r} has schema {scheme!r}; use http or https.")
    return f"{scheme}://{connection.host}:{connection.port or DEFAULT_PORT}"
