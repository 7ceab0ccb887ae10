"""The way to a Ray cluster: its dashboard's Jobs REST API, without ray on this machine.

A job runs ``python -m airflow_provider_raylm.cluster <verb>``; ``wire`` says how it is told what to do.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from airflow_provider_raylm import __version__
from airflow_provider_raylm.dashboard import Dashboard
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.inventory import RUNNING, SeenEngine, SeenJob, engines_in, job_info, jobs_in
from airflow_provider_raylm.packages import Archive, Packed, package_archive
from airflow_provider_raylm.polling import JobInfo
from airflow_provider_raylm.sealing import PAD
from airflow_provider_raylm.specs import EngineRef, RuntimeEnv
from airflow_provider_raylm.wire import HANDED_VARIABLE, NAMESPACE_VARIABLE, REQUEST_VARIABLE, handed

# Linux refuses an environment string over 128 KiB (MAX_ARG_STRLEN).
_MAX_REQUEST_BYTES = 120_000
# A look at the end of a log may fail in any way: the next one tells why.
_ANYTHING = tuple(range(300, 600))


@dataclass(frozen=True)
class JobRequest:
    """What to run on the cluster, under which id.

    Attributes:
        submission_id: the job's id, chosen by the caller so that a retry finds the job.
        verb: deploy, infer, plan, preview, teardown or sweep.
        payload: the verb's arguments, JSON values.
        metadata: strings that Ray's dashboard shows with the job: whose it is.
        environment: what it finds there beside the image.
        storage: options of fsspec's file systems, by protocol: credentials, which the cluster shows to nobody.
        pad: with which the job seals rows that it reports; see ``sealing``.
    """

    submission_id: str
    verb: str
    payload: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    environment: Packed = field(default_factory=Packed)
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    pad: bytes = field(default=b"", repr=False)

    @property
    def secrets(self) -> Mapping[str, Any]:
        """What only the job may see, as JSON values."""
        return {**self.storage, **({PAD: base64.b64encode(self.pad).decode()} if self.pad else {})}

    def wire(self) -> str:
        """Return the request as the cluster reads it.

        Raises:
            SpecError: it does not fit into the job's environment, and never will.
        """
        spec = self.environment.spec
        text = json.dumps(
            {
                "version": __version__,
                "payload": dict(self.payload),
                "env_vars": sorted(spec.env_vars),
                "secret_env": dict(spec.secret_env),
            }
        )
        if len(text.encode()) > _MAX_REQUEST_BYTES:
            raise SpecError(
                f"the {self.verb} request has {len(text.encode()):,} bytes; a job carries {_MAX_REQUEST_BYTES:,}. "
                "Shorten the prompt, or name fewer source files (a folder or a glob)."
            )
        return text


class FollowedJobs(Protocol):
    """A cluster as whoever follows a job of it sees it."""

    def get(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None when the cluster knows none by that id."""

    def logs(self, submission_id: str, lines: int | None = None) -> str:
        """Return the last *lines* of the job's output, or all; empty while there is none."""

    def stop(self, submission_id: str) -> None:
        """Ask the job to stop; no error when it has ended or never was."""


class RayJobs(FollowedJobs, Protocol):
    """A cluster that runs jobs. ``RayJobsClient`` is the real one, ``testing.FakeRayJobs`` the one for unit tests."""

    @property
    def dashboard_url(self) -> str:
        """Address of the dashboard, for links."""

    @property
    def runtime_env(self) -> RuntimeEnv:
        """What jobs get that do not say otherwise."""

    def ray_version(self) -> str:
        """Return the cluster's Ray version.

        Raises:
            ClusterError: refused, or not a Ray dashboard.
            Unreachable: no answer.
        """

    def submit(self, request: JobRequest) -> bool:
        """Start a job; return False when one with that id exists already (then nothing is started)."""

    def running_engines(self) -> tuple[EngineRef, ...]:
        """Return the engines that can take work, whoever deployed them through this provider."""

    def all_engines(self) -> tuple[SeenEngine, ...]:
        """Return all engines that are there, also those that are coming or going."""

    def all_jobs(self) -> tuple[SeenJob, ...]:
        """Return the jobs of this package that Ray has not forgotten."""

    def close(self) -> None:
        """Give back what the client holds."""


@dataclass(frozen=True)
class Jobs:
    """How a cluster runs jobs: what its connection says.

    Attributes:
        ship_package: upload this package with the first job, so that the cluster runs the worker's version; else
            it must be installed there.
        python: the interpreter of the cluster's jobs.
        namespace: Ray namespace of the jobs; None for one of its own for each.
        runtime_env: what jobs get that do not say otherwise.
        entrypoint: what an inference job's own process asks of the cluster: num_cpus, memory (bytes) and resources, as
            Ray's Jobs API names them after ``entrypoint_``.
    """

    ship_package: bool = True
    python: str = "python"
    namespace: str | None = None
    runtime_env: RuntimeEnv = field(default_factory=RuntimeEnv)
    entrypoint: Mapping[str, Any] = field(default_factory=dict)


class RayJobsClient:
    """The Jobs REST API over HTTP(S). Close it after use.

    Args:
        dashboard_url: e.g. ``https://ray-head:8265``.
        token: sent as ``Authorization: Bearer``; Ray asks for one when token authentication is on.
        headers: further headers, e.g. of a proxy in front of the dashboard.
        verify: False switches certificate checks off; a path names the CA's certificate file.
        timeout: seconds per request.
        browser_url: address of the dashboard for people; default: *dashboard_url*.
        **jobs: the fields of ``Jobs``.

    Raises:
        SpecError: HTTP cannot carry the token or a header; the text names which, never its value.
    """

    def __init__(
        self,
        dashboard_url: str,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        verify: bool | str = True,
        timeout: float = 30.0,
        browser_url: str | None = None,
        **jobs: Any,
    ) -> None:
        self._dashboard = Dashboard(dashboard_url, token, headers, verify, timeout)
        self._browser_url = (browser_url or dashboard_url).rstrip("/")
        self._how = Jobs(**jobs)

    def close(self) -> None:
        """Close the connections."""
        self._dashboard.close()

    @property
    def dashboard_url(self) -> str:
        """Address of the dashboard, for links."""
        return self._browser_url

    @property
    def runtime_env(self) -> RuntimeEnv:
        """What jobs get that do not say otherwise."""
        return self._how.runtime_env

    def ray_version(self) -> str:
        """Return the cluster's Ray version."""
        return str(self._dashboard.said(self._dashboard.call("GET", "/api/version"), "ray_version"))

    def submit(self, request: JobRequest) -> bool:
        """Start a job; return False when one with that id exists already."""
        runtime_env = request.environment.for_ray()
        package = [package_archive()] if self._how.ship_package else []
        modules = [*self._uploaded(package), *runtime_env.get("py_modules", [])]
        self._uploaded(request.environment.archives)
        env_vars = {
            **runtime_env.get("env_vars", {}),
            REQUEST_VARIABLE: request.wire(),
            "RAY_BACKEND_LOG_LEVEL": "fatal",
            "RAY_TQDM": "0",
            **({NAMESPACE_VARIABLE: self._how.namespace} if self._how.namespace else {}),
            **({HANDED_VARIABLE: self._hand_over(request.secrets)} if request.secrets else {}),
        }
        entrypoint = self._how.entrypoint if request.verb == "infer" else {}
        body = {
            "entrypoint": f"{self._how.python} -m airflow_provider_raylm.cluster {request.verb}",
            "submission_id": request.submission_id,
            "runtime_env": {**runtime_env, "env_vars": env_vars, **({"py_modules": modules} if modules else {})},
            "metadata": dict(request.metadata),
            **{f"entrypoint_{name}": value for name, value in entrypoint.items()},
        }
        # A taken id is answered with 400 or 500, by which of Ray's processes notices it.
        response = self._dashboard.call("POST", "/api/jobs/", json=body, accept=(400, 500))
        if response.is_success:
            self._dashboard.said(response, "submission_id")
            return True
        if "already exists" in response.text:
            return False
        raise self._dashboard.refusal(response)

    def get(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None when the cluster knows none by that id."""
        response = self._dashboard.call("GET", f"/api/jobs/{quote(submission_id, safe='')}", accept=(404,))
        if not self._dashboard.is_there(response):
            return None
        return self._dashboard.read(response, job_info)

    def logs(self, submission_id: str, lines: int | None = None) -> str:
        """Return the last *lines* of the job's output, or all; empty while there is none."""
        if lines is not None:
            # Of the end alone only Ray's state API tells. Where it does not answer, the whole is asked for.
            # A node has to be named; the job's own is taken.
            query = {"submission_id": submission_id, "node_id": "any", "lines": str(lines)}
            end = self._dashboard.call("GET", "/api/v0/logs/file", params=query, accept=_ANYTHING)
            if end.is_success and end.headers.get("content-type", "").startswith("text/plain"):
                return end.content.decode(errors="replace")
        response = self._dashboard.call("GET", f"/api/jobs/{quote(submission_id, safe='')}/logs", accept=(404,))
        if not self._dashboard.is_there(response):
            return ""
        return str(self._dashboard.said(response, "logs") or "")

    def stop(self, submission_id: str) -> None:
        """Ask the job to stop.

        Opens a connection of its own: a signal handler may call this while another request holds the pool's lock.
        """
        with self._dashboard.open() as http:
            path = f"/api/jobs/{quote(submission_id, safe='')}/stop"
            response = self._dashboard.call("POST", path, accept=(404,), http=http)
            if self._dashboard.is_there(response):
                self._dashboard.said(response, "stopped")

    def running_engines(self) -> tuple[EngineRef, ...]:
        """Return the engines that can take work, whoever deployed them through this provider."""
        return tuple(engine.ref for engine in self.all_engines() if engine.status == RUNNING and not engine.foreign)

    def all_engines(self) -> tuple[SeenEngine, ...]:
        """Return all engines that are there, also those that are coming or going."""
        answer = self._dashboard.call("GET", "/api/serve/applications/")
        return self._dashboard.read(answer, lambda told: engines_in(told["applications"], self._browser_url))

    def all_jobs(self) -> tuple[SeenJob, ...]:
        """Return the jobs of this package that Ray has not forgotten."""
        return self._dashboard.read(self._dashboard.call("GET", "/api/jobs/"), jobs_in)

    def _uploaded(self, archives: Iterable[Archive]) -> list[str]:
        """Bring archives to the cluster, those that it lacks, and return their addresses."""
        return [self._upload(archive.name, archive.content) for archive in archives]

    def _upload(self, name: str, content: bytes) -> str:
        path = f"/api/packages/gcs/{name}"
        # The look keeps the package from being collected until the job refers to it; for ten minutes, if none does.
        answer = self._dashboard.call("GET", path, accept=(404,))
        if not self._dashboard.is_there(answer):
            answer = self._dashboard.call("PUT", path, content=content)
        self._dashboard.require_no_words(answer)
        return f"gcs://{name}"

    def _hand_over(self, given: Mapping[str, Any]) -> str:
        """Leave what only the job may know where it takes it from, and return the place.

        The dashboard shows a job's environment and metadata, and no package's content.
        """
        return self._upload(f"_ray_pkg_{secrets.token_hex(16)}.zip", handed(given))
