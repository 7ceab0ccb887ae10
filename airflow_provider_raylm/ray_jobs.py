"""The way to a Ray cluster: its dashboard's Jobs REST API, without ray on this machine.

A job runs ``python -m airflow_provider_raylm.cluster <verb>``; ``wire`` says how it is told what to do.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import ssl
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from airflow_provider_raylm import __version__
from airflow_provider_raylm.errors import ClusterError, SpecError
from airflow_provider_raylm.naming import APPLICATION_PREFIX
from airflow_provider_raylm.polling import JobInfo, Unreachable
from airflow_provider_raylm.specs import EngineRef, build
from airflow_provider_raylm.wire import NAMESPACE_VARIABLE, REQUEST_VARIABLE

# Linux refuses an environment string over 128 KiB (MAX_ARG_STRLEN).
_MAX_REQUEST_BYTES = 120_000
# RFC 9110, of the values only what is ASCII.
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")


@dataclass(frozen=True)
class JobRequest:
    """What to run on the cluster, under which id.

    Attributes:
        submission_id: the job's id, chosen by the caller so that a retry finds the job.
        verb: deploy, infer, teardown or sweep.
        payload: the verb's arguments, JSON values.
        metadata: strings that Ray's dashboard shows with the job: whose it is.
    """

    submission_id: str
    verb: str
    payload: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def wire(self) -> str:
        """Return the request as the cluster reads it.

        Raises:
            ClusterError: it does not fit into the job's environment.
        """
        text = json.dumps({"version": __version__, "payload": dict(self.payload)})
        if len(text.encode()) > _MAX_REQUEST_BYTES:
            raise ClusterError(
                f"the {self.verb} request has {len(text.encode()):,} bytes; a job carries {_MAX_REQUEST_BYTES:,}. "
                "Shorten the prompt, or name fewer source files (a folder or a glob)."
            )
        return text


class RayJobs(Protocol):
    """A cluster that runs jobs. ``RayJobsClient`` is the real one, ``testing.FakeRayJobs`` the one for unit tests."""

    @property
    def dashboard_url(self) -> str:
        """Address of the dashboard, for links and messages."""

    def ray_version(self) -> str:
        """Return the cluster's Ray version.

        Raises:
            ClusterError: refused, or not a Ray dashboard.
            Unreachable: no answer.
        """

    def submit(self, request: JobRequest) -> bool:
        """Start a job; return False when one with that id exists already (then nothing is started)."""

    def get(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None when the cluster knows none by that id."""

    def logs(self, submission_id: str, offset: int = 0) -> str:
        """Return the job's output from character *offset* on."""

    def stop(self, submission_id: str) -> None:
        """Ask the job to stop; no error when it has ended or never was."""

    def running_engines(self) -> tuple[EngineRef, ...]:
        """Return the engines that can take work, whoever deployed them through this provider."""

    def close(self) -> None:
        """Give back what the client holds."""


class RayJobsClient:
    """The Jobs REST API over HTTP(S). Close it after use.

    Args:
        dashboard_url: e.g. ``https://ray-head:8265``.
        token: sent as ``Authorization: Bearer``; Ray asks for one when token authentication is on.
        headers: further headers, e.g. of a proxy in front of the dashboard.
        verify: False switches certificate checks off; a path names the CA's certificate file.
        ship_package: upload this package with the first job, so that the cluster runs the worker's version; else
            it must be installed there.
        python: the interpreter of the cluster's jobs.
        namespace: Ray namespace of the jobs; None for one of its own for each.
        timeout: seconds per request.

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
        ship_package: bool = True,
        python: str = "python",
        namespace: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._url = dashboard_url.rstrip("/")
        sent = {f"headers.{name}": (name, value) for name, value in (headers or {}).items()}
        if token := (token or "").strip():
            sent["token"] = ("Authorization", f"Bearer {token}")
        self._headers = {name: _sendable(field, name, value) for field, (name, value) in sent.items()}
        self._secrets = [secret for secret in {token, *self._headers.values()} if secret]
        self._verify = _ssl_context(verify)
        self._ship_package = ship_package
        self._python = python
        self._namespace = namespace
        self._timeout = timeout
        self._http = self._open()

    def _open(self) -> httpx.Client:
        return httpx.Client(base_url=self._url, headers=self._headers, verify=self._verify, timeout=self._timeout)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def dashboard_url(self) -> str:
        """Address of the dashboard."""
        return self._url

    def ray_version(self) -> str:
        """Return the cluster's Ray version."""
        response = self._call("GET", "/api/version")
        try:
            return str(response.json()["ray_version"])
        except (ValueError, KeyError):
            raise ClusterError(
                f"{self._url} answers, but not as a Ray dashboard: {self._without_secrets(response.text)[:200]!r}. "
                "Check host and port."
            ) from None

    def submit(self, request: JobRequest) -> bool:
        """Start a job; return False when one with that id exists already."""
        env_vars = {REQUEST_VARIABLE: request.wire(), "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_TQDM": "0"}
        if self._namespace:
            env_vars[NAMESPACE_VARIABLE] = self._namespace
        runtime_env: dict[str, Any] = {"env_vars": env_vars}
        if self._ship_package:
            runtime_env["py_modules"] = [self._upload_package()]
        body = {
            "entrypoint": f"{self._python} -m airflow_provider_raylm.cluster {request.verb}",
            "submission_id": request.submission_id,
            "runtime_env": runtime_env,
            "metadata": dict(request.metadata),
        }
        # A taken id is answered with 400 or 500, by which of Ray's processes notices it.
        response = self._call("POST", "/api/jobs/", json=body, accept=(400, 500))
        if response.is_success:
            return True
        if "already exists" in response.text:
            return False
        raise self._refusal(response)

    def get(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None when the cluster knows none by that id."""
        response = self._call("GET", f"/api/jobs/{quote(submission_id, safe='')}", accept=(404,))
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        job = response.json()
        return JobInfo(job["status"], job.get("message") or "", job.get("metadata") or {})

    def logs(self, submission_id: str, offset: int = 0) -> str:
        """Return the job's output from character *offset* on; empty while there is none."""
        response = self._call("GET", f"/api/jobs/{quote(submission_id, safe='')}/logs", accept=(404,))
        if response.status_code == httpx.codes.NOT_FOUND:
            return ""
        return str(response.json()["logs"] or "")[offset:]

    def stop(self, submission_id: str) -> None:
        """Ask the job to stop.

        Opens a connection of its own: a signal handler may call this while another request holds the pool's lock.
        """
        with self._open() as http:
            path = f"/api/jobs/{quote(submission_id, safe='')}/stop"
            self._call("POST", path, accept=(404,), http=http)

    def running_engines(self) -> tuple[EngineRef, ...]:
        """Return the engines that can take work, whoever deployed them through this provider."""
        applications = self._call("GET", "/api/serve/applications/").json()["applications"]
        found = []
        for name, application in applications.items():
            if not name.startswith(APPLICATION_PREFIX) or application["status"] != "RUNNING":
                continue
            for deployment in application["deployments"].values():
                about = deployment["deployment_config"].get("user_config")
                # An engine of another version may say what this one does not understand: it is not for this one.
                with suppress(SpecError):
                    found.append(build(EngineRef, {**(about or {}), "application": name, "dashboard_url": self._url}))
        return tuple(found)

    def _upload_package(self) -> str:
        name, content = package_archive()
        path = f"/api/packages/gcs/{name}"
        # The look keeps the package from being collected until the job refers to it.
        if self._call("GET", path, accept=(404,)).status_code == httpx.codes.NOT_FOUND:
            self._call("PUT", path, content=content)
        return f"gcs://{name}"

    def _call(
        self,
        method: str,
        path: str,
        *,
        accept: tuple[int, ...] = (),
        http: httpx.Client | None = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """Send one request; every failure of the transport is translated here and nowhere else."""
        try:
            response = (http or self._http).request(method, path, **kwargs)
        except httpx.TransportError as error:
            if _is_certificate_error(error):
                raise ClusterError(
                    f"{self._url}: the certificate is not trusted ({self._without_secrets(str(error))}). Name your "
                    'CA\'s file in the connection\'s extra ("ca_cert"), or switch the check off there ("verify": '
                    "false)."
                ) from None
            # Not `from error`: Airflow prints what an error was raised from, and a transport may quote a header.
            raise Unreachable(
                f"{self._url} does not answer ({type(error).__name__}: {self._without_secrets(str(error))}). Check "
                "the connection's host and port, and that the Ray head is up and its dashboard listens on that address."
            ) from None
        if response.is_success or response.status_code in accept:
            return response
        raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> ClusterError:
        code = response.status_code
        if code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return ClusterError(
                f"{self._url} answers {code}: the token is missing or wrong. Put the cluster's token "
                "(`ray get-auth-token` on the head node) into the connection's password."
            )
        request = f"{response.request.method} {response.request.url.path}"
        kind = Unreachable if code >= 500 else ClusterError
        return kind(f"{self._url} answers {code} to {request}: {_last_line(self._without_secrets(response.text))}")

    def _without_secrets(self, text: str) -> str:
        """Return somebody else's words without what only the dashboard may read: a proxy may send a request back."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def _sendable(field: str, name: str, value: str) -> str:
    """Return a header's value without the blanks around it.

    Raises:
        SpecError: HTTP cannot carry it. An HTTP client's own error would quote it.
    """
    value = value.strip()
    if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
        raise SpecError(
            f"{field}: it has a character that an HTTP header cannot carry, such as a line break or a letter beyond "
            f"ASCII. {'Copy the token' if field == 'token' else 'Write it'} into the connection again."
        )
    return value


def _ssl_context(verify: bool | str) -> ssl.SSLContext | bool:
    if isinstance(verify, str):
        try:
            return ssl.create_default_context(cafile=verify)
        except OSError as error:
            raise ClusterError(f"cannot read the CA certificate {verify!r}: {error}") from error
    return verify


def _is_certificate_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _last_line(text: str) -> str:
    """Return the last line of a body, which is where a server's traceback names the error."""
    lines = [line for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:500] if lines else "(no text)"


def _package_files() -> Iterator[tuple[str, bytes]]:
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        yield f"{root.name}/{path.relative_to(root).as_posix()}", path.read_bytes()


@cache
def package_archive() -> tuple[str, bytes]:
    """Return (name, content) of this package as a zip that Ray's ``py_modules`` accepts.

    The name carries a hash of the files, so that equal packages are uploaded once and another version never meets
    the cached one.
    """
    buffer = io.BytesIO()
    digest = hashlib.sha256()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _package_files():
            digest.update(name.encode() + b"\0" + content)
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), content)
    return f"_ray_pkg_{digest.hexdigest()[:32]}.zip", buffer.getvalue()
