"""An S3 server on loopback, which can be slow, refuse, or be overloaded; and what a client needs to reach it."""

import hashlib
import hmac
import json
import os
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
# Of one who is not in any environment: what they sign is checked.
PRIVATE_BUCKET = "private"
PRIVATE_KEY, PRIVATE_SECRET = "private-key", "priv4te-s3cr3t-0f-tests"
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """The server.

    Attributes:
        url: its address.
        environ: what a client's process needs to reach it.
        requests: how many came, by method.
        delay: seconds that each one takes longer.
        overloaded: whether it answers 503 SlowDown.
        only: of keys that begin so; anything else is denied. None: all is allowed.
    """

    def __init__(self, app):
        self._app = app
        self.requests = Counter()
        self.denied = []
        self.delay = 0.0
        self.overloaded = False
        self.only = None
        self.before = lambda method, path: None
        self.url = ""

    @property
    def environ(self):
        return {**_CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    def __call__(self, environ, start_response):
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        self.requests[method] += 1
        time.sleep(self.delay)
        self.before(method, path)
        if path.strip("/").partition("/")[0] == PRIVATE_BUCKET and not _is_signed(environ):
            return _refuse(start_response, "403 Forbidden", "SignatureDoesNotMatch")
        if self.overloaded:
            return _refuse(start_response, "503 Slow Down", "SlowDown")
        if self.only is not None and not self._allowed(path, query):
            self.denied.append(f"{method} {path}?{query}")
            return _refuse(start_response, "403 Forbidden", "AccessDenied")
        return self._app(environ, start_response)

    def _allowed(self, path, query):
        """Return whether a policy for one prefix has this request: its keys, and listings of it."""
        key = path.removeprefix(f"/{BUCKET}").strip("/")
        if key:
            return key.startswith(self.only)
        asked = dict(part.partition("=")[::2] for part in query.split("&"))
        return "delete" in asked or asked.get("prefix", "").replace("%2F", "/").startswith(self.only)


def _is_signed(environ):
    """Return whether a request is signed with the private secret, after AWS's Signature Version 4."""
    given = dict(re.findall(r"(\w+)=([^,\s]+)", environ.get("HTTP_AUTHORIZATION", "")))
    key, _, scope = given.get("Credential", "").partition("/")
    names = given.get("SignedHeaders", "").split(";")
    values = {
        name: environ.get("HTTP_" + name.upper().replace("-", "_"), environ.get(name.upper().replace("-", "_"), ""))
        for name in names
    }
    path, _, query = environ["RAW_URI"].partition("?")
    asked = "&".join(sorted(part if "=" in part else f"{part}=" for part in query.split("&") if part))
    request = "\n".join(
        [
            *(environ["REQUEST_METHOD"], path, asked),
            *(f"{name}:{' '.join(value.split())}" for name, value in values.items()),
            *("", ";".join(names), environ.get("HTTP_X_AMZ_CONTENT_SHA256", "")),
        ]
    )
    text = "\n".join(
        ["AWS4-HMAC-SHA256", environ.get("HTTP_X_AMZ_DATE", ""), scope, hashlib.sha256(request.encode()).hexdigest()]
    )
    signer = f"AWS4{PRIVATE_SECRET}".encode()
    for part in (*scope.split("/"), text):
        signer = hmac.new(signer, part.encode(), hashlib.sha256).digest()
    return key == PRIVATE_KEY and signer.hex() == given.get("Signature")


def _refuse(start_response, status, code):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass


@contextmanager
def s3_server():
    """Start a server with one empty bucket, and stop it."""
    state = Server(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, state, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def reached(server):
    """Let this process's s3fs reach the server, as a cluster's would by its environment."""
    before = {name: os.environ.get(name) for name in server.environ}
    os.environ.update(server.environ)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fs = fsspec.filesystem("s3")
    fs.mkdir(BUCKET)
    try:
        yield fs
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        fsspec.get_filesystem_class("s3").clear_instance_cache()


if __name__ == "__main__":
    with s3_server() as running:
        print(json.dumps(running.environ), flush=True)
        threading.Event().wait()
