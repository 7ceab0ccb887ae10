"""One HTTP client of a Ray dashboard: what is sent with every request, and what each way of not answering means."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx

from airflow_provider_raylm.errors import ClusterError, SpecError
from airflow_provider_raylm.polling import Refused, Unreachable

# RFC 9110, of the values only what is ASCII.
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")
# What Ray's dashboard says of a job, which a proxy's "not found" does not.
_RAYS_NOT_FOUND = "does not exist"
# Of what a server refuses, beside its own failures and redirects: time-outs, too much at a time, and a dashboard that a
# proxy does not find.
_PASSING = frozenset({404, 408, 425, 429})

Read = TypeVar("Read")


class Dashboard:
    """Requests to a Ray dashboard over HTTP(S), and what its answers mean. Close it after use.

    Args:
        url: e.g. ``https://ray-head:8265``.
        token: sent as ``Authorization: Bearer``; Ray asks for one when token authentication is on.
        headers: further headers, e.g. of a proxy in front of the dashboard.
        verify: False switches certificate checks off; a path names the CA's certificate file.
        timeout: seconds per request.

    Raises:
        SpecError: HTTP cannot carry the token or a header; the text names which, never its value.
    """

    def __init__(
        self, url: str, token: str | None, headers: Mapping[str, str] | None, verify: bool | str, timeout: float
    ) -> None:
        self.url = url.rstrip("/")
        sent = {f"headers.{name}": (name, value) for name, value in (headers or {}).items()}
        if token := (token or "").strip():
            sent["token"] = ("Authorization", f"Bearer {token}")
        self._headers = {name: _sendable(field, name, value) for field, (name, value) in sent.items()}
        self._secrets = [secret for secret in {token, *self._headers.values()} if secret]
        self._verify = _ssl_context(verify)
        self._timeout = timeout
        self._http = self.open()

    def open(self) -> httpx.Client:
        """Return a client with connections of its own."""
        # Without the environment's proxies where there is no way through one.
        return httpx.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=self._timeout,
            verify=self._verify,
            transport=httpx.HTTPTransport(verify=self._verify) if is_loopback(self.url) else None,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        accept: tuple[int, ...] = (),
        http: httpx.Client | None = None,
        **kwargs: Any,
    ) -> httpx.Response:
        """Send one request; every failure of the transport is translated here and nowhere else.

        Args:
            method: HTTP's.
            path: below the dashboard.
            accept: statuses beside success that the caller understands.
            http: another client than this one's own.
            **kwargs: httpx's.

        Raises:
            Unreachable: no answer, or none of Ray's.
            Refused: the token is missing or wrong.
            ClusterError: the certificate is not trusted, or Ray refuses the request.
        """
        try:
            response = (http or self._http).request(method, path, **kwargs)
        # Also of an answer that cannot be read, such as one that a proxy has packed otherwise than it says.
        except httpx.RequestError as error:
            if _is_certificate_error(error):
                raise ClusterError(
                    f"{self.url}: the certificate is not trusted ({self._without_secrets(str(error))}). Name your "
                    'CA\'s file in the connection\'s extra ("ca_cert"), or switch the check off there ("verify": '
                    "false)."
                ) from None
            # Not `from error`: Airflow prints what an error was raised from, and a transport may quote a header.
            raise Unreachable(
                f"{self.url} does not answer ({type(error).__name__}: {self._without_secrets(str(error))}). Check "
                "the connection's host and port, and that the Ray head is up and its dashboard listens on that address."
            ) from None
        if response.is_success or response.status_code in accept:
            return response
        raise self.refusal(response)

    def is_there(self, response: httpx.Response) -> bool:
        """Return whether the job or package is there that was asked for.

        Raises:
            Unreachable: somebody else than Ray says that it is not, such as a proxy that has lost the dashboard.
        """
        if response.status_code != httpx.codes.NOT_FOUND:
            return True
        if _RAYS_NOT_FOUND in response.text:
            return False
        raise self.refusal(response)

    def said(self, response: httpx.Response, key: str) -> Any:
        """Return what the dashboard says under *key*.

        Raises:
            Unreachable: it is not the dashboard that has answered, such as a page to log in.
        """
        return self.read(response, lambda answer: answer[key])

    def read(self, response: httpx.Response, of: Callable[[Any], Read]) -> Read:
        """Return what *of* makes of the dashboard's answer, from JSON.

        Raises:
            Unreachable: it can make nothing of it: it is not the dashboard that has answered, but perhaps a gateway.
        """
        try:
            return of(response.json())
        except (ValueError, LookupError, TypeError, AttributeError):
            raise self._somebody_else(response) from None

    def require_no_words(self, response: httpx.Response) -> None:
        """Check that the dashboard has answered, which says nothing of a package that it has.

        Raises:
            Unreachable: there is a text: it is not the dashboard that has answered.
        """
        if response.content:
            raise self._somebody_else(response)

    def _somebody_else(self, response: httpx.Response) -> Unreachable:
        return Unreachable(
            f"{self.url} answers, but not as a Ray dashboard: {self._without_secrets(response.text)[:200]!r}. "
            "Check host and port, and what stands in front of it."
        )

    def refusal(self, response: httpx.Response) -> ClusterError:
        """Return what an answer other than success means."""
        code = response.status_code
        if code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return Refused(
                f"{self.url} answers {code}: the token is missing or wrong. Put the cluster's token "
                "(`ray get-auth-token` on the head node) into the connection's password."
            )
        request = f"{response.request.method} {response.request.url.path}"
        where = f" (to {response.next_request.url.host})" if response.next_request is not None else ""
        words = f"{self.url} answers {code} to {request}{where}: {_last_line(self._without_secrets(response.text))}"
        return Unreachable(words) if code in _PASSING or code >= 500 or code < 400 else ClusterError(words)

    def _without_secrets(self, text: str) -> str:
        """Return somebody else's words without what only the dashboard may read: a proxy may send a request back."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def is_loopback(url: str) -> bool:
    """Return whether an address is this machine's own."""
    host = httpx.URL(url).host
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


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
