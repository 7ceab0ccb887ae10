"""From an Airflow connection to a Ray cluster."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

import httpx
from airflow.sdk import BaseHook
from pydantic import BeforeValidator, Field

from airflow_provider_raylm import local
from airflow_provider_raylm.credentials import said_in_extra
from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.ray_jobs import RayJobs, RayJobsClient
from airflow_provider_raylm.specs import RuntimeEnv, Value, build
from airflow_provider_raylm.specs.base import read_json_text

DEFAULT_PORT = 8265
# Of what stands in front of a dashboard, and ends TLS.
DEFAULT_TLS_PORT = 443
LOCAL_HOST = "local"
_LAST_PORT = 65535
# A name's parts have up to 63 characters, of any script; an address of IPv6 stands in brackets.
_ADDRESS = re.compile(r"https?://(\[[^\]]+\]|[\w-]{1,63}(\.[\w-]{1,63})*\.?):(?P<port>[0-9]{1,5})(/[^?#\s]*)?")


class Extra(Value):
    """What a raylm connection's extra may hold."""

    verify: bool = Field(True, description="Check the dashboard's certificate.")
    ca_cert: str | None = Field(None, description="File with the CA's certificate, on the worker.")
    headers: dict[str, str] = Field(default_factory=dict, description="Further HTTP headers.")
    ship_package: bool = Field(True, description="Send this package along with each job.")
    python: str = Field("python", description="Interpreter of the cluster's jobs.")
    namespace: str | None = Field(None, description="Ray namespace of the jobs, for row functions' named actors.")
    runtime_env: Annotated[RuntimeEnv, BeforeValidator(read_json_text)] = Field(
        RuntimeEnv(), description="What deploys and inference tasks get that do not say otherwise."
    )
    entrypoint_num_cpus: float = Field(0, ge=0, description="CPUs that an inference job's own process reserves.")
    entrypoint_memory: int = Field(512 << 20, ge=0, description="Bytes of memory that it reserves.")
    entrypoint_resources: Annotated[dict[str, float], BeforeValidator(read_json_text)] = Field(
        default_factory=dict, description="Ray's resources that it reserves, such as those of some nodes."
    )
    timeout: float = Field(30, gt=0, description="Seconds per HTTP request.")
    browser_url: str | None = Field(
        None,
        pattern=r"^https?://[^/]+",
        description="Address of the dashboard for people's browsers, for the links of tasks, where it is another.",
    )
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="What an hour of one GPU costs, in your currency, for estimates and the engines page."
    )

    @property
    def entrypoint(self) -> dict[str, Any]:
        """What an inference job's own process reserves, by Ray's names after ``entrypoint_``."""
        asked = {
            "num_cpus": self.entrypoint_num_cpus,
            "memory": self.entrypoint_memory,
            "resources": self.entrypoint_resources,
        }
        return {name: value for name, value in asked.items() if value}


class RayLMHook(BaseHook):
    """Talks to one Ray cluster through its dashboard; needs no ray on the worker.

    The connection's host, port (8265, with https 443), schema (http or https) and password (the cluster's token) give
    the address; the host may be a whole URL. The extra is ``Extra``. ``raylm://local`` is a Ray head on this machine,
    started when none answers.

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

    @property
    def extra(self) -> Extra:
        """What the connection's extra says.

        Raises:
            SpecError: it has an unknown or bad field.
        """
        return extra_of(self.get_connection(self.raylm_conn_id))

    def get_conn(self) -> RayJobs:
        """Return a client of the connection's cluster; close it after use.

        Raises:
            SpecError: the connection's extra has an unknown or bad field.
            ClusterError: no host, an unreadable CA file, or the local cluster did not start.
        """
        return client_of(self.get_connection(self.raylm_conn_id))

    async def aget_conn(self) -> RayJobs:
        """Do as ``get_conn`` without holding an event loop up."""
        return await asyncio.to_thread(client_of, await self.aget_connection(self.raylm_conn_id))

    def test_connection(self) -> tuple[bool, str]:
        """Return whether the dashboard answers and accepts the token, and a sentence about it."""
        try:
            jobs = self.get_conn()
            return True, f"Ray {jobs.ray_version()} answers at {jobs.dashboard_url}"
        except (ClusterError, ValueError) as error:
            return False, str(error)


def extra_of(connection: Any) -> Extra:
    """Return what a connection's extra says.

    Raises:
        SpecError: it has an unknown or bad field, or is no object.
    """
    # The form stores a field that was left empty as null.
    return build(Extra, {name: value for name, value in said_in_extra(connection).items() if value is not None})


def client_of(connection: Any, *, start_local: bool = True, timeout: float | None = None) -> RayJobsClient:
    """Return a client of a connection's cluster; close it after use.

    Args:
        connection: Airflow's, of tasks or of the database.
        start_local: start the cluster of this machine where ``raylm://local`` finds none.
        timeout: seconds per request at most, beside what the extra says.

    Raises:
        SpecError: the connection's extra has an unknown or bad field.
        ClusterError: no host, an unreadable CA file, or the local cluster did not start.
    """
    extra = extra_of(connection)
    token = connection.password or None
    if connection.host == LOCAL_HOST:
        port = connection.port or DEFAULT_PORT
        url = local.ensure_local_cluster(port) if start_local else f"http://{local.HOST}:{port}"
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
        runtime_env=extra.runtime_env,
        entrypoint=extra.entrypoint,
        timeout=min(extra.timeout, timeout or extra.timeout),
        browser_url=extra.browser_url,
    )


def _address(connection: Any) -> str:
    if not connection.host:
        raise ClusterError(
            f"The connection {connection.conn_id!r} has no host. Set it to the address of the Ray dashboard, or to "
            f"{LOCAL_HOST!r} for a cluster on this machine."
        )
    given, _, rest = connection.host.strip().rpartition("://")
    host, _, path = rest.partition("/")
    # An address of IPv6 alone has no port; with one it stands in brackets.
    bare = host.count(":") > 1 and not host.startswith("[")
    name, port = (host, "") if bare or host.endswith("]") else _without_port(host)
    scheme = _only(connection, "schema", (connection.schema or "").lower(), given.lower()) or "http"
    if scheme not in ("http", "https"):
        raise ClusterError(f"The connection {connection.conn_id!r} has schema {scheme!r}; use http or https.")
    known = _only(connection, "port", str(connection.port or ""), port)
    default = DEFAULT_TLS_PORT if scheme == "https" else DEFAULT_PORT
    address = f"{scheme}://{f'[{name}]' if bare else name}:{known or default}"
    address = f"{address}/{path.strip('/')}" if path.strip("/") else address
    if not _is_address(address):
        # What stands before an @ is somebody's password.
        shown = connection.host.rpartition("@")[2]
        raise ClusterError(f"The connection {connection.conn_id!r} has host {shown!r}, which is no address.")
    return address


def _is_address(url: str) -> bool:
    """Return whether a request can be made of it: its own failure would be none of this package's errors."""
    matched = _ADDRESS.fullmatch(url)
    try:
        # It reads addresses of IP, too.
        httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return matched is not None and int(matched["port"]) <= _LAST_PORT


def _without_port(host: str) -> tuple[str, str]:
    name, colon, port = host.rpartition(":")
    return (name, port) if colon else (host, "")


def _only(connection: Any, field: str, own: str | None, in_host: str) -> str:
    """Return what the field or the host says; both may, if they say the same.

    Raises:
        ClusterError: they do not.
    """
    if own and in_host and own != in_host:
        raise ClusterError(
            f"The connection {connection.conn_id!r} has {field} {own}, and {in_host} in its host {connection.host!r}: "
            "say it once."
        )
    return own or in_host
