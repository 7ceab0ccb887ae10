"""Who can see and reach what, on a real cluster that asks for a token."""

import asyncio
import io
import ssl
import threading
from contextlib import closing, contextmanager, suppress

import grpc
import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import s3fs
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from airflow_provider_raylm import local
from airflow_provider_raylm.errors import BatchError, ClusterError, EngineError
from airflow_provider_raylm.packages import pack
from airflow_provider_raylm.ray_jobs import RayJobsClient
from airflow_provider_raylm.specs import RuntimeEnv
from tests.clusters import Cluster
from tests.conftest import LABELS, REPOSITORY, SECRET_NAMES
from tests.s3 import PRIVATE_BUCKET, PRIVATE_KEY, PRIVATE_SECRET

NOBODY = {"delete": [], "max_age": None, "installation": "nobody"}


def environments(pids, words):
    """Yield the environments of the processes whose command line has *words*."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if words in " ".join(process.cmdline()):
                yield process.environ()


def shown_by(cluster):
    """Return all that Ray's dashboard and state API show, by path."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    parts = ("actors", "jobs", "nodes", "placement_groups", "runtime_envs", "tasks", "workers")
    paths = ["/api/jobs/", "/api/serve/applications/", *(f"/api/v0/{part}?detail=1&limit=10000" for part in parts)]
    return {
        path: httpx.get(f"{cluster.url}{path}", headers=headers, timeout=60).raise_for_status().text for path in paths
    }


def test_secrets_are_where_they_belong_and_nowhere_else(cluster, engine, engine_spec, secret):
    """In vLLM's processes and what Ray starts for them; not in what Ray shows of anything, and in no log."""
    value = secret.read_text().strip()
    # Not on a path: Ray starts helpers on the nodes, to download it.
    hub = {**engine_spec, "name": "hub", "model": "nobody/nothing"}
    with pytest.raises(EngineError, match="did not start"):
        cluster.run("deploy", {"engine": hub, "labels": {**LABELS, "engine": "hub"}, "replace": False})
    pids = local.session(cluster.leader)
    shown = shown_by(cluster)
    logs = [path.read_text(errors="replace") for path in cluster.logs.rglob("*") if path.is_file()]

    (at_work,) = environments(pids, "VLLM::EngineCore")
    assert {name: at_work.get(name) for name in SECRET_NAMES} == dict.fromkeys(SECRET_NAMES, value)
    assert engine["application"] in shown["/api/serve/applications/"]
    assert "initialize_remote_node" in shown["/api/v0/tasks?detail=1&limit=10000"]
    assert [path for path, text in shown.items() if value in text or cluster.token in text] == []
    assert not any(value in text or cluster.token in text for text in logs)


ROWS = """import os


def clean(row):
    return {**row, "seen": f"{os.environ['AUTHORS_OWN']} {os.environ['AUTHORS_SECRET'][::-1]}"}
"""


def test_the_authors_code_and_credentials_reach_a_task_and_nobody_else(cluster, engine, s3, secret, tmp_path):
    """A function in no image, a secret from a node's file, a storage that only the right credentials open.

    Then they are in no answer of Ray's, in no file of its session, in no log and not in the output.
    """
    (tmp_path / "beside_the_dag").mkdir()
    (tmp_path / "beside_the_dag" / "rows.py").write_text(ROWS)
    spec = {"env_vars": {"AUTHORS_OWN": "own"}, "secret_env": {"AUTHORS_SECRET": str(secret)}}
    environment = pack(RuntimeEnv(**spec, py_modules=("beside_the_dag",)), tmp_path)
    storage = {"s3": {"key": PRIVATE_KEY, "secret": PRIVATE_SECRET}}
    fs = s3fs.S3FileSystem(**storage["s3"], endpoint_url=s3.url)
    fs.makedirs(PRIVATE_BUCKET, exist_ok=True)
    fs.pipe_file(f"{PRIVATE_BUCKET}/in/a.txt", b"one\ntwo\n")
    batch = {"source": f"s3://{PRIVATE_BUCKET}/in", "prompt": "Say: ${text}", "max_tokens": 4}
    batch |= {"output": f"s3://{PRIVATE_BUCKET}/out", "preprocess": "beside_the_dag.rows:clean"}
    work = {"engine": engine, "batch": batch}

    report = cluster.run("infer", work, {"environment": environment, "storage": storage})
    wrong = {"s3": {"key": PRIVATE_KEY, "secret": "wr0ng-s3cr3t"}}
    refused = []
    for given in ({"environment": environment}, {"environment": environment, "storage": wrong}):
        with pytest.raises(BatchError, match=r"Forbidden|SignatureDoesNotMatch|Access") as error:
            cluster.run("infer", work, given)
        refused.append(str(error.value))

    files = {name: fs.cat_file(name) for name in fs.find(f"{PRIVATE_BUCKET}/out")}
    rows = [
        row
        for name, content in files.items()
        if "/part-" in name
        for row in pq.read_table(io.BytesIO(content)).to_pylist()
    ]
    value = secret.read_text().strip()
    assert (report["rows_written"], {row["seen"] for row in rows}) == (2, {f"own {value[::-1]}"})
    hidden = (PRIVATE_SECRET, "wr0ng-s3cr3t", value)
    written = [path.read_bytes() for path in (cluster.folder / "ray").rglob("*") if path.is_file()]
    everywhere = [*shown_by(cluster).values(), *refused, *written, *files.values()]
    found = [
        one[:200] for one in everywhere for each in hidden if (each if isinstance(one, str) else each.encode()) in one
    ]
    assert found == []
    left = cluster.run_script(REPOSITORY / "tests" / "integration" / "left_packages.py", *(one[::-1] for one in hidden))
    assert "packages: " in left
    assert "with a secret: 0" in left


def test_helpers_of_the_engine_read_the_secrets_themselves(cluster, secret):
    """Before anything else runs in them, with nothing but a file's name in their runtime_env."""
    script = REPOSITORY / "tests" / "integration" / "read_secret.py"

    assert f"found {secret.read_text().strip()[::-1]}" in cluster.run_script(script, secret)


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
