"""What a job finds on the cluster beside its image: how it is told, packed, merged, and handed to the cluster."""

import http.server
import io
import json
import threading
import zipfile
from contextlib import closing, contextmanager

import pytest
from airflow.sdk import DAG

from airflow_provider_raylm import packages
from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.naming import fingerprint
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.packages import pack
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobsClient
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, RuntimeEnv, build
from airflow_provider_raylm.testing import FakeRayJobs
from tests.unit.test_authoring import run


@pytest.fixture
def beside(tmp_path):
    """A folder of DAGs with a package, a module and some files that nobody needs."""
    for name, text in {
        "my_pkg/__init__.py": "",
        "my_pkg/rows.py": "def clean(row):\n    return row\n",
        "my_pkg/words.txt": "words",
        "my_pkg/__pycache__/rows.pyc": "x",
        "my_pkg/.git/config": "x",
        "alone.py": "A = 1\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(archive):
    with zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
        return opened.namelist()


def test_folders_are_packed_as_their_importer_needs_them(beside):
    """A package inside its own name, a module alone, a working folder's files without it; addresses are left."""
    spec = RuntimeEnv(py_modules=("my_pkg", "alone.py", "s3://b/other.zip"), working_dir=str(beside / "my_pkg"))
    packed = pack(spec, beside)

    assert names(packed.py_modules[0]) == ["my_pkg/__init__.py", "my_pkg/rows.py", "my_pkg/words.txt"]
    assert names(packed.py_modules[1]) == ["alone.py"]
    assert names(packed.working_dir) == ["__init__.py", "rows.py", "words.txt"]
    assert packed.for_ray()["py_modules"] == [*(f"gcs://{one.name}" for one in packed.archives[:2]), "s3://b/other.zip"]
    assert len(packed.archives) == 3


def test_only_another_content_is_another_package(beside):
    """Whoever packs it, and when."""
    spec = RuntimeEnv(py_modules=("my_pkg",))
    before = pack(spec, beside).identity
    (beside / "my_pkg" / "rows.py").touch()
    assert pack(spec, beside).identity == before
    (beside / "my_pkg" / "words.txt").write_text("other words")
    assert pack(spec, beside).identity != before
    assert pack(RuntimeEnv(), beside).identity == {}


def test_what_cannot_be_packed(beside, monkeypatch):
    """Names the field and the way out, before anything is submitted."""
    with pytest.raises(SpecError, match=r"runtime_env\.py_modules: there is no folder or module .*/nowhere on this"):
        pack(RuntimeEnv(py_modules=("nowhere",)), beside)
    with pytest.raises(SpecError, match=r"runtime_env\.working_dir: there is no folder .*alone\.py"):
        pack(RuntimeEnv(working_dir="alone.py"), beside)
    monkeypatch.setattr(packages, "_MAX_BYTES", 10)
    with pytest.raises(SpecError, match=r"runtime_env\.py_modules: .* Leave data out"):
        pack(RuntimeEnv(py_modules=("my_pkg",)), beside)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"conda": "x"}, r"runtime_env: conda: not taken over; set pip or uv"),
        ({"image_uri": "x"}, "image_uri: not taken over; the cluster has one image"),
        ({"env": {}}, "env: not taken over; known are env_vars, secret_env, py_modules"),
        ({"pip": ["a"], "uv": ["b"]}, "uv: pip is given, too"),
        ({"pip": "requirements.txt"}, "expected a list, got the text 'requirements.txt'"),
        ({"env_vars": {"A": "b"}, "secret_env": {"A": "/f"}}, r"secret_env\.A: env_vars sets it, too"),
        ({"env_vars": {"RAYLM_REQUEST": "b"}}, r"env_vars\.RAYLM_REQUEST: this package's own"),
        ({"env_vars": {"CUDA_VISIBLE_DEVICES": "0"}}, r"runtime_env\.env_vars\.CUDA_VISIBLE_DEVICES: Ray chooses"),
        ({"secret_env": {"RAY_NAMESPACE": "b"}}, r"secret_env\.RAY_NAMESPACE: set the connection's namespace"),
    ],
)
def test_what_is_not_honoured_is_refused(fields, words):
    """When the DAG is parsed."""
    with DAG("d", schedule=None), pytest.raises(SpecError, match=words):
        with shared_engine("e", model="m", runtime_env=fields):
            pass


def test_one_says_what_the_other_leaves_out():
    """Of variables each by itself; a secret hides a plain value of its name."""
    below = RuntimeEnv(env_vars={"A": "1", "B": "1", "C": "1"}, secret_env={"D": "/d"}, pip=("x",), working_dir="w")
    above = RuntimeEnv(env_vars={"B": "2", "D": "2"}, secret_env={"C": "/c"}, uv=("y",))
    both = above.over(below)

    assert (both.env_vars, both.secret_env) == ({"A": "1", "B": "2", "D": "2"}, {"C": "/c"})
    assert (both.pip, both.uv, both.working_dir) == ((), ("y",), "w")
    assert RuntimeEnv().over(below) == below == below.over(RuntimeEnv())


def test_an_engine_is_another_by_its_packages_not_by_its_authors_code():
    """A function that has changed is no reason to load a model again."""
    engine = {"name": "e", "model": "m"}
    plain = fingerprint(EngineSpec(**engine))
    assert fingerprint(EngineSpec(**engine, runtime_env={"py_modules": ["a"], "working_dir": "b"})) == plain
    assert fingerprint(EngineSpec(**engine, runtime_env={"pip": ["a"]})) != plain
    assert fingerprint(EngineSpec(**engine, runtime_env='{"pip": ["a"]}')) != plain


BATCH = {"source": "s3://in", "prompt": "${text}", "preprocess": "my_pkg.rows:clean"}


def test_an_engine_and_its_tasks_get_the_same(airflow_db, beside, monkeypatch):
    """Over the connection's; a task may add to it. The teardown gets none of it: it has to work in any case."""
    fake = FakeRayJobs()
    fake.runtime_env = RuntimeEnv(env_vars={"WHERE": "connection", "TEAM": "a"})
    env = {"env_vars": {"WHERE": "{{ dag.dag_id }}"}, "py_modules": ["my_pkg"]}
    with DAG("same", schedule=None) as dag, shared_engine("e", model="m", runtime_env=env) as engine:
        engine.infer("one", output="s3://out/one", **BATCH)
        engine.infer("two", output="s3://out/two", runtime_env={"env_vars": {"MORE": "x"}}, **BATCH)

        @engine.task
        def three():
            return {**BATCH, "output": "s3://out/three"}

        three()
    dag.fileloc = str(beside / "dag.py")
    assert set(run(dag, fake).values()) == {"success"}
    seen = {request.metadata["task_id"]: request.environment for request in fake.submitted}
    variables = {name: dict(one.spec.env_vars) for name, one in seen.items()}

    both = {"WHERE": "same", "TEAM": "a"}
    assert variables["deploy_e"] == variables["one"] == variables["three"] == both
    assert variables["two"] == {**both, "MORE": "x"}
    assert variables["teardown_e"] == {}
    archives = {name: [archive.name for archive in one.archives] for name, one in seen.items()}
    assert archives["deploy_e"] == archives["one"] == archives["two"] == archives["three"]
    assert archives["teardown_e"] == []


def test_another_dags_folders_are_not_here(airflow_db):
    """An engine that a sensor found brings nothing but itself; the task says what it needs."""
    ref = {"application": "raylm-a-1", "deployment": "engine", "model": "m", "fingerprint": "f", "lease": {}}
    ref |= {"runtime_env": {"py_modules": ["my_pkg"], "env_vars": {"A": "b"}}}
    mine = {"installation": "i", "dag_id": "mine", "run_id": "r", "engine": "a"}
    with DAG("mine", schedule=None):
        task = BatchInferenceOperator(
            task_id="x", engine="{{ e }}", batch={**BATCH, "output": "s3://o"}, runtime_env={"env_vars": {"C": "d"}}
        )
    got = {}
    for owner in ("mine", "other"):
        task.engine = {**ref, "labels": {**mine, "dag_id": owner}}
        got[owner] = task.command({}).runtime_env

    assert got["other"] == RuntimeEnv(env_vars={"C": "d"})
    assert got["mine"] == RuntimeEnv(env_vars={"A": "b", "C": "d"}, py_modules=("my_pkg",))


@contextmanager
def recording():
    """A dashboard that has no package and takes every job; yields its address and what it was sent."""
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404, explain=f"Package {self.path} does not exist")

        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent.append((self.command, self.path, body))
            self.send_response(200)
            self.end_headers()
            if self.command == "POST":
                self.wfile.write(json.dumps({"submission_id": json.loads(body)["submission_id"]}).encode())

        do_POST = do_PUT

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def submitted(request, **how):
    """Return the body of the job that a client submits, and the contents of what it uploads, by address."""
    with recording() as (url, sent), closing(RayJobsClient(url, **how)) as jobs:
        assert jobs.submit(request)
    (job,) = [json.loads(body) for method, _, body in sent if method == "POST"]
    return job, {f"gcs://{path.rpartition('/')[2]}": body for method, path, body in sent if method == "PUT"}


def test_a_job_is_told_where_its_things_are(beside):
    """The author's modules beside this package, by content; variables, but no secret."""
    spec = RuntimeEnv(
        env_vars={"A": "b"}, secret_env={"S": "/run/s"}, py_modules=("my_pkg",), working_dir="my_pkg", uv=("x==1",)
    )
    job, uploads = submitted(JobRequest("j", "infer", {}, environment=pack(spec, beside)))
    env = job["runtime_env"]

    assert env["py_modules"][0] == packages.package_archive().uri
    assert [*env["py_modules"], env["working_dir"]] == list(uploads)
    assert (env["env_vars"]["A"], env["uv"], "pip" in env) == ("b", ["x==1"], False)
    told = json.loads(env["env_vars"]["RAYLM_REQUEST"])
    assert (told["env_vars"], told["secret_env"]) == (["A"], {"S": "/run/s"})


def test_credentials_are_nowhere_in_a_request():
    """They are uploaded by themselves, to a place that is another one each time; nothing prints them."""
    request = JobRequest("j", "infer", {}, storage={"s3": {"secret": "sup3r-s3cr3t"}})
    (job, uploads), (other, _) = (submitted(request, ship_package=False) for _ in range(2))
    place = job["runtime_env"]["env_vars"]["RAYLM_HANDED"]

    assert "sup3r" not in json.dumps(job) + repr(request)
    assert b"sup3r-s3cr3t" in uploads[place]
    # Ray's log has the first bytes of a package that it cannot store.
    assert b"sup3r" not in uploads[place][:20]
    assert other["runtime_env"]["env_vars"]["RAYLM_HANDED"] != place


def test_inference_jobs_reserve_what_they_need(monkeypatch):
    """So that as many begin at a time as there is room for. What frees an engine never waits for room."""
    connection = {"conn_type": "raylm", "host": "h", "extra": {"runtime_env": {"env_vars": {"A": "b"}}}}
    more = {
        **connection,
        "extra": {"entrypoint_num_cpus": 0.5, "entrypoint_memory": 0, "entrypoint_resources": {"n": 1}},
    }
    asked = {}
    for name, one in (("plain", connection), ("more", more)):
        monkeypatch.setenv("AIRFLOW_CONN_RAYLM_TEST", json.dumps(one))
        how = RayLMHook("raylm_test").get_conn()._how
        for verb in ("infer", "deploy", "teardown", "sweep"):
            job, _ = submitted(JobRequest("j", verb, {}), ship_package=False, entrypoint=how.entrypoint)
            asked[name, verb] = {key: value for key, value in job.items() if key.startswith("entrypoint_")}
        if name == "plain":
            assert how.runtime_env == RuntimeEnv(env_vars={"A": "b"})

    assert asked["plain", "infer"] == {"entrypoint_memory": 512 << 20}
    assert asked["more", "infer"] == {"entrypoint_num_cpus": 0.5, "entrypoint_resources": {"n": 1.0}}
    assert not any(asked[name, verb] for name, verb in asked if verb != "infer")


def test_a_batch_spec_knows_nothing_of_it():
    """It is written into the manifest."""
    assert not {"runtime_env", "storage_options", "storage_conn_id"} & set(BatchSpec.model_fields)
    assert build(RuntimeEnv, {"py_modules": '["a"]'}).py_modules == ("a",)
