"""The way to the dashboard: every way it can be barred is said in a sentence that names the address and the remedy."""

import http.server
import json
import os
import ssl
import threading
import traceback
from contextlib import closing, contextmanager

import pytest

from airflow_provider_raylm.errors import BatchError, ClusterError, SpecError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.local import find_token
from airflow_provider_raylm.packages import package_archive
from airflow_provider_raylm.polling import Unreachable
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobsClient
from airflow_provider_raylm.wire import ERROR_SENTINEL, RESULT_SENTINEL, outcome

VERSION = json.dumps({"ray_version": "2.60.0"})


@contextmanager
def dashboard(status=200, body=VERSION, certificate=None, headers=()):
    """A web server on loopback that gives one answer; yields its address and the headers it got."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", "https://sso.example/login")
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"{'https' if certificate else 'http'}://localhost:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def version(url, **kwargs):
    with closing(RayJobsClient(url, **kwargs)) as jobs:
        return jobs.ray_version()


def test_the_token_and_headers_are_sent():
    """With every request."""
    with dashboard() as (url, seen):
        assert version(url, token="secret", headers={"X-Proxy": "a"}) == "2.60.0"

    assert seen[0]["Authorization"] == "Bearer secret"
    assert seen[0]["X-Proxy"] == "a"


def test_a_token_with_a_line_break_at_its_end():
    """As `echo` leaves it: what is around a token is none of it."""
    with dashboard() as (url, seen):
        assert version(url, token="secret\n", headers={"X-Proxy": " a\r\n"}) == "2.60.0"

    assert (seen[0]["Authorization"], seen[0]["X-Proxy"]) == ("Bearer secret", "a")


@pytest.mark.parametrize("hidden", ["zq\nxj-7", "zq\rxj-7", "zqxj\u00e9-7", "zqxj\x00-7", "\u2028zqxj-7\u20ac"])
@pytest.mark.parametrize("field", ["token", "headers.X-Key"])
def test_a_secret_that_http_refuses_is_not_shown(monkeypatch, hidden, field):
    """Neither in the message nor in what it was raised from, in whatever form."""
    extra = {} if field == "token" else {"headers": {"X-Key": hidden}}
    connection = {"conn_type": "raylm", "host": "127.0.0.1", "port": 9, "extra": extra}
    connection |= {"password": hidden} if field == "token" else {}
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_TEST", json.dumps(connection))
    with pytest.raises(SpecError, match=rf"{field}: it has a character that an HTTP header cannot carry") as refused:
        RayLMHook("raylm_test").get_conn()
    ok, sentence = RayLMHook("raylm_test").test_connection()

    assert not ok
    shown = "".join(traceback.format_exception(refused.value)) + sentence
    assert "zq" not in shown
    assert "xj" not in shown


@pytest.mark.parametrize("status", [404, 500])
def test_a_proxy_that_sends_the_request_back(status):
    """Its page is quoted without the token."""
    with dashboard(status, body="<pre>Authorization: Bearer secret-7\nX-Key: key-8</pre>") as (url, _):
        with pytest.raises(ClusterError, match=r"\*\*\*") as refused:
            version(url, token="secret-7", headers={"X-Key": "key-8"})
    assert not any(secret in str(refused.value) for secret in ("secret-7", "key-8"))

    with dashboard(200, body="Bearer secret-7 key-8") as (url, _):
        with pytest.raises(ClusterError, match=r"\*\*\*") as refused:
            version(url, token="secret-7", headers={"X-Key": "key-8"})
    assert not any(secret in str(refused.value) for secret in ("secret-7", "key-8"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token(status):
    """Says where the token belongs."""
    with dashboard(status) as (url, _), pytest.raises(ClusterError, match=rf"{url} answers {status}.*password"):
        version(url)


def test_nobody_there():
    """Says what to check; may be over the next time."""
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9 does not answer.*host and port"):
        version("http://127.0.0.1:9")


def test_something_else_there():
    """Another web server is no dashboard; a broken one may recover."""
    with dashboard(body="<html>") as (url, _), pytest.raises(ClusterError, match="not as a Ray dashboard"):
        version(url)
    with dashboard(502, body="Traceback\nValueError: no agent\n.\n") as (url, _):
        with pytest.raises(Unreachable, match="answers 502 to GET /api/version: ValueError: no agent"):
            version(url)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "<html>no such host</html>"),
        (408, ""),
        (429, "slow down"),
        (503, "no backend"),
        (302, ""),
        (200, "<html>log in</html>"),
        (200, "[]"),
        (200, "{}"),
        (200, '{"status": "ok", "message": "alive"}'),
        (200, '{"status": "RUNNING", "metadata": "a"}'),
        (200, '{"status": ["RUNNING"]}'),
    ],
)
def test_what_is_not_rays_own_word_is_silence(status, body):
    """A proxy, an ingress or a page to log in says nothing of a job, and takes neither a job nor a stop."""
    with dashboard(status, body=body) as (url, _), closing(RayJobsClient(url)) as jobs:
        for ask in (jobs.get, jobs.logs):
            with pytest.raises(Unreachable, match=url):
                ask("job-1")
        with pytest.raises(Unreachable, match=url):
            jobs.stop("job-1")
        with pytest.raises(Unreachable, match=url):
            jobs.submit(JobRequest("job-1", "infer", {}))
        with pytest.raises(Unreachable, match=url):
            jobs.running_engines()
    with dashboard(status, body=body) as (url, _), closing(RayJobsClient(url, ship_package=False)) as jobs:
        with pytest.raises(Unreachable, match=url):
            jobs.submit(JobRequest("job-1", "infer", {}))


def test_an_answer_that_cannot_be_read_is_silence():
    """Such as one that a proxy has packed otherwise than it says."""
    with dashboard(headers=[("Content-Encoding", "gzip")]) as (url, _):
        with pytest.raises(Unreachable, match=rf"{url} does not answer \(DecodingError"):
            version(url)


def test_rays_own_word_is_no_silence():
    """Of a job that it does not know."""
    with dashboard(404, body="Job job-1 does not exist") as (url, _), closing(RayJobsClient(url)) as jobs:
        assert jobs.get("job-1") is None
        assert jobs.logs("job-1") == ""
        jobs.stop("job-1")


def test_a_package_is_there_when_ray_says_so():
    """Which it does without a word; a page to log in is another's."""
    with dashboard(body="") as (url, _), closing(RayJobsClient(url)) as jobs:
        assert jobs._upload("p.zip", b"p") == "gcs://p.zip"
    with dashboard(body="<html>log in</html>") as (url, _), closing(RayJobsClient(url)) as jobs:
        with pytest.raises(Unreachable, match="not as a Ray dashboard"):
            jobs._upload("p.zip", b"p")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_way_to_this_machine_leads_through_no_proxy(monkeypatch, variable):
    """Whatever the environment says; the way to others does."""
    with dashboard(503, body="a proxy") as (proxy, seen):
        monkeypatch.setenv(variable, proxy)
        with dashboard() as (url, _):
            assert version(url) == "2.60.0"
            assert version(url.replace("localhost", "127.0.0.1")) == "2.60.0"
        assert not seen
        if variable != "ALL_PROXY":
            with pytest.raises(Unreachable, match="answers 503"):
                version("http://ray.example")
            assert seen


def test_a_certificate_that_is_not_trusted(certificate):
    """Verification is on by default; an own CA can be named, or the check switched off."""
    with dashboard(certificate=certificate) as (url, _):
        with pytest.raises(ClusterError, match=r"certificate is not trusted.*ca_cert.*verify"):
            version(url)
        assert version(url, verify=str(certificate)) == "2.60.0"
        assert version(url, verify=False) == "2.60.0"
    with pytest.raises(ClusterError, match="cannot read the CA certificate"):
        version("https://localhost", verify="/no/such/file")


def test_a_request_that_no_job_can_carry():
    """Linux bounds an environment string; the author has to change something."""
    with pytest.raises(SpecError, match=r"carries 120,000.*Shorten the prompt"):
        JobRequest("a", "infer", {"x": "y" * 120_000}).wire()


def test_the_package_travels_as_the_same_bytes():
    """Equal packages have equal names: they are uploaded once."""
    first = package_archive()
    package_archive.cache_clear()

    assert first == package_archive()
    assert first.name.startswith("_ray_pkg_")


def test_an_outcome_is_the_last_word():
    """Whatever noise surrounds it; an error keeps its class."""
    assert outcome(f'noise\n{RESULT_SENTINEL}{{"a": 1}}\nlate noise') == {"a": 1}
    with pytest.raises(BatchError, match="^no rows$"):
        outcome(ERROR_SENTINEL + json.dumps({"type": "BatchError", "message": "no rows"}))
    with pytest.raises(ClusterError, match="(?s)without a result.*the end"):
        outcome("begin\nthe end\n")
    with pytest.raises(ClusterError, match="runtime env failed"):
        outcome("", "runtime env failed")
    with pytest.raises(ClusterError, match="does not have the package"):
        outcome("python: No module named airflow_provider_raylm.cluster\n")


def connection(monkeypatch, uri):
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_TEST", uri)
    return RayLMHook("raylm_test")


def test_a_connection_leads_to_its_dashboard(monkeypatch):
    """Address, token and extras, and a sentence for the form's Test button."""
    with dashboard() as (url, seen):
        hook = connection(
            monkeypatch, url.replace("http://", "raylm://:to%2Fken@") + "/?ship_package=false&namespace=n"
        )
        ok, sentence = hook.test_connection()
        client = hook.get_conn()

    assert (ok, sentence) == (True, f"Ray 2.60.0 answers at {url}")
    assert seen[0]["Authorization"] == "Bearer to/ken"
    assert (client._how.ship_package, client._how.namespace) == (False, "n")


def test_a_connection_that_cannot_work(monkeypatch):
    """The test fails with the reason; it does not raise."""
    ok, sentence = connection(monkeypatch, "raylm://127.0.0.1:9").test_connection()
    assert not ok
    assert "does not answer" in sentence

    ok, sentence = connection(monkeypatch, json.dumps({"conn_type": "raylm"})).test_connection()
    assert not ok
    assert "has no host" in sentence

    broken = {"conn_type": "raylm", "host": "h", "extra": {"verfy": False}}
    with pytest.raises(SpecError, match=r"Extra\.verfy: unknown field"):
        connection(monkeypatch, json.dumps(broken)).get_conn()
    empty_form = {"conn_type": "raylm", "host": "h", "schema": "https", "extra": {"verify": None, "timeout": None}}
    assert connection(monkeypatch, json.dumps(empty_form)).get_conn().dashboard_url == "https://h:443"


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"host": "ray-head"}, "http://ray-head:8265"),
        ({"host": "ray-head", "port": 80}, "http://ray-head:80"),
        ({"host": "ray-head", "schema": "https"}, "https://ray-head:443"),
        ({"host": "ray-head:9000"}, "http://ray-head:9000"),
        ({"host": "https://ray.example"}, "https://ray.example:443"),
        ({"host": "https://ray.example:8443/", "schema": "https", "port": 8443}, "https://ray.example:8443"),
        ({"host": "http://gate.example/ray/night/"}, "http://gate.example:8265/ray/night"),
        ({"host": "gate.example/ray", "schema": "https"}, "https://gate.example:443/ray"),
        ({"host": "::1"}, "http://[::1]:8265"),
        ({"host": "[fd00::7]:9000"}, "http://[fd00::7]:9000"),
        ({"host": "[fd00::7]"}, "http://[fd00::7]:8265"),
        ({"host": "https://[fd00::7]/ray"}, "https://[fd00::7]:443/ray"),
        ({"host": " HTTPS://Ray_Head.example. ", "schema": "HTTPS"}, "https://Ray_Head.example.:443"),
    ],
)
def test_a_host_may_be_written_in_many_ways(monkeypatch, fields, url):
    """As people copy it."""
    hook = connection(monkeypatch, json.dumps({"conn_type": "raylm", **fields}))
    assert hook.get_conn().dashboard_url == url


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"host": "https://h", "schema": "http"}, "has schema http, and https in its host"),
        ({"host": "h:1", "port": 2}, "has port 2, and 1 in its host"),
        ({"host": "ftp://h"}, "has schema 'ftp'; use http or https"),
        ({"host": "h:ray"}, "which is no address"),
        *(
            ({"host": host}, "which is no address")
            for host in (
                "https://",
                "h..x",
                ".h",
                "[fd00::zz]",
                "fd00::zz",
                "1.2.3.400",
                "h:99999",
                "a b",
                "h?x=1",
                "h#x",
            )
        ),
        ({"host": "someone:hidden@h:80"}, "has host 'h:80', which is no address"),
    ],
)
def test_what_a_host_cannot_be(monkeypatch, fields, words):
    """One thing is said once."""
    with pytest.raises((ClusterError, SpecError), match=words):
        connection(monkeypatch, json.dumps({"conn_type": "raylm", **fields})).get_conn()


def test_a_dashboard_below_a_path_and_another_for_browsers(monkeypatch):
    """Requests go below the path; links lead where people can go."""
    paths = []
    with dashboard() as (url, _):
        extra = {"browser_url": "https://ray.example/night/"}
        uri = json.dumps({"conn_type": "raylm", "host": f"{url}/below", "extra": extra})
        with closing(connection(monkeypatch, uri).get_conn()) as client:
            response = client._dashboard.call("GET", "/api/version")
            paths.append(response.request.url.path)
            assert client.dashboard_url == "https://ray.example/night"
    assert paths == ["/below/api/version"]


def test_the_local_token_is_found_where_ray_looks(tmp_path, monkeypatch):
    """In Ray's own order."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "elsewhere").write_text("file")
    by_path = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "elsewhere")}

    assert find_token({}) == "home"
    assert find_token(by_path) == "file"
    assert find_token({**by_path, "RAY_AUTH_TOKEN": "variable"}) == "variable"
    assert os.environ.get("RAY_AUTH_TOKEN") is None
