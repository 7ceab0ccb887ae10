"""What all tests share: an Airflow home of their own, and nothing that reaches for the network."""

import os
import re
import secrets
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DAGS = REPOSITORY / "dags"

# Of the engine that all tests share.
LABELS = {"installation": "tests", "dag_id": "d", "run_id": "manual__2026-01-01T00:00:00+00:00", "engine": "shared"}
# The first is nobody's; libraries treat the others specially.
SECRET_NAMES = (
    "RAYLM_TEST_SECRET",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "GOOGLE_API_KEY",
    "RAY_TEST_SECRET",
    "VLLM_API_KEY",
)

# Airflow reads these when it is imported, which the test modules do: before any fixture.
AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="raylm-airflow-"))
os.environ.update(
    AIRFLOW_HOME=str(AIRFLOW_HOME),
    AIRFLOW__CORE__DAGS_FOLDER=str(DAGS),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{AIRFLOW_HOME}/airflow.db",
    AIRFLOW__LOGGING__LOGGING_LEVEL="WARNING",
    AIRFLOW__RAYLM__INSTALLATION="tests",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    # An S3 that is overloaded is asked again by botocore, and all that by s3fs: together that would take a minute.
    AWS_MAX_ATTEMPTS="2",
)


# What needs the cluster's software is left out where there is none, as on a worker.
ON_THE_CLUSTER = re.compile(r"^(from|import) (airflow_provider_raylm\.cluster|pyarrow|ray)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path):
    if collection_path.suffix == ".py" and find_spec("ray") is None:
        return ON_THE_CLUSTER.search(collection_path.read_text()) is not None or None
    return None


def pytest_unconfigure():
    shutil.rmtree(AIRFLOW_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def airflow_db():
    """Make Airflow's database."""
    from airflow.utils.db import initdb

    initdb()


@pytest.fixture(scope="session")
def dagbag(airflow_db):
    """The DAGs that users copy."""
    from tests.airflows import DagBag

    return DagBag(str(DAGS))


@pytest.fixture(scope="session")
def s3():
    """An S3 server, which the cluster's processes reach."""
    pytest.importorskip("ray")
    from tests.s3 import reached, s3_server

    with s3_server() as server, reached(server):
        yield server


@pytest.fixture(scope="session")
def cluster(s3):
    """A Ray cluster that asks for a token; all tests share it."""
    from tests.clusters import ray_cluster

    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def model(cluster):
    """A small model with random weights."""
    from tests.tiny_model import make_tiny_model

    return str(make_tiny_model(cluster.folder / "model"))


@pytest.fixture(scope="session")
def secret(cluster):
    """A file with a secret."""
    path = cluster.folder / "secret"
    path.write_text(f"{secrets.token_hex(16)}\n")
    return path


@pytest.fixture(scope="session")
def engine_spec(model, secret):
    """The shared engine's spec."""
    from tests.offline import ENGINE_KWARGS

    # Half a CPU on paper, so that a second engine and the pipelines fit beside it on two cores.
    return {
        "name": "shared",
        "model": model,
        "served_model_name": "tiny",
        "gpus_per_worker": 0,
        "num_cpus": 0.5,
        # Chats take vLLM's own way with a parser; those of images are asked of an engine without one.
        "engine_kwargs": {**ENGINE_KWARGS, "tool_call_parser": "hermes", "enable_auto_tool_choice": True},
        # Else vLLM holds a tool's arguments to a grammar of its own, with white space, of which the model finds no end.
        "env": {"VLLM_ENFORCE_STRICT_TOOL_CALLING": "0"},
        "secret_env": dict.fromkeys(SECRET_NAMES, str(secret)),
    }


@pytest.fixture(scope="session")
def engine(cluster, engine_spec):
    """The engine that all tests share, by reference."""
    ref, said = cluster.finish(
        cluster.start("deploy", {"engine": engine_spec, "labels": LABELS, "replace": False}), timeout=580
    )
    assert ref["adopted"] is False
    assert any("is up after" in line for line in said)
    return ref


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for localhost that nobody has signed but itself, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", str(path) + ".crt"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + (path.parent / (path.name + ".crt")).read_text())
    return path
