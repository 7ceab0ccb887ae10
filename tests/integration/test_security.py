"""Who can see and reach what, on a real cluster that asks for a token."""

import asyncio
import ssl
import threading
from contextlib import closing, contextmanager, suppress

import grpc
import httpx
import psutil
import pytest
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from airflow_provider_raylm import local
from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.ray_jobs import RayJobsClient
from tests.clusters import Cluster

NOBODY = {"delete": [], "max_age": None, "installation": "nobody"}


def environments(pids, words):
    """Yield the environments of the processes whose command line has *words*."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if words in " ".join(process.cmdline()):
                yield process.environ()


def test_secrets_are_where_they_belong_and_nowhere_else(cluster, engine, secret):
    """In vLLM's processes; not in what Ray shows of jobs and deployments, and in no log."""
    value = secret.read_text().strip()
    pids = local.session(cluster.leader)
    headers = {"Authorization": f"Bearer {cluster.token}"}
    shown = [
        httpx.get(f"{cluster.url}{path}", headers=headers, timeout=60).raise_for_status().text
        for path in ("/api/jobs/", "/api/serve/applications/", "/api/v0/actors?detail=1", "/api/v0/workers?detail=1")
    ]
    logs = [path.read_text(errors="replace") for path in cluster.logs.rglob("*") if path.is_file()]

    assert [env["RAYLM_TEST_SECRET"] for env in environments(pids, "VLLM::EngineCore")] == [value]
    assert engine["application"] in shown[1]
    assert not any(value in text for text in shown + logs)
    assert not any(cluster.token in text for text in shown + logs)


def test_an_engine_opens_no_port_of_its_own(cluster, engine):
    """Calls go through handles: no proxy, no route. The one port that Serve gives each replica asks for the token."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    serve = httpx.get(f"{cluster.url}/api/serve/applications/", headers=headers, timeout=60).json()

    assert serve["proxies"] == {}
    assert serve["applications"][engine["application"]]["route_prefix"] is None
    beyond = cluster.listening_beyond_loopback()
    assert sorted(name.rpartition(":")[2] for name, _ in beyond) == ["engine", f"lease-{engine['fingerprint']}"]
    for _, port in beyond:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            ASGIServiceStub(channel).HandleRequest(ASGIRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@contextmanager
def tls_before(cluster, certificate):
    """Yield the address of a server that ends TLS and hands on to the dashboard, as an ingress does."""
    host, port = cluster.url.removeprefix("http://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    loop = asyncio.new_event_loop()

    async def pump(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader, writer):
        there, back = await asyncio.open_connection(host, port)
        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()


def test_a_job_over_tls(cluster, certificate):
    """With the CA's file all works as without TLS, and a wrong token is told from a wrong certificate."""
    with tls_before(cluster, certificate) as url:
        secure = Cluster(cluster.folder, url, cluster.token, cluster.environ)
        assert secure.run("sweep", NOBODY, verify=str(certificate)) == {"engines": [], "deleted": []}
        with pytest.raises(ClusterError, match="certificate is not trusted"):
            secure.run("sweep", NOBODY)
        with closing(RayJobsClient(url, token="wrong", verify=str(certificate))) as jobs:
            with pytest.raises(ClusterError, match="the token is missing or wrong"):
                jobs.ray_version()
