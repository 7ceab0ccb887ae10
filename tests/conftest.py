"""What all tests share: an Airflow home of their own, and nothing that reaches for the network."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DAGS = REPOSITORY / "dags"

# Airflow reads these when it is imported, which the test modules do: before any fixture.
AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="raylm-airflow-"))
os.environ.update(
    AIRFLOW_HOME=str(AIRFLOW_HOME),
    AIRFLOW__CORE__DAGS_FOLDER=str(DAGS),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{AIRFLOW_HOME}/airflow.db",
    AIRFLOW__LOGGING__LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
)


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
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(str(DAGS))


@pytest.fixture(scope="session")
def s3():
    """An S3 server, which the cluster's processes reach."""
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
def certificate(tmp_path_factory):
    """A certificate for localhost that nobody has signed but itself, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", str(path) + ".crt"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + (path.parent / (path.name + ".crt")).read_text())
    return path
