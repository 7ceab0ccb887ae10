"""One Airflow for all of the system tests, with every folder of DAGs that the repository has."""

import random
from contextlib import ExitStack

import pytest

from tests.chaos.scene import Scene, airflow_environ
from tests.chaos.scripted_engine import scripted
from tests.conftest import DAGS, REPOSITORY
from tests.offline import ENGINE_KWARGS
from tests.standalone import Standing

# Seconds that a run with an engine of its own has, which is at work after twenty on a machine with nothing else to do.
RUN_TIMEOUT_S = 60
# Longer than a task is silent while it works: ten seconds.
SHORT_LEASE = {"idle_timeout": 15, "max_lifetime": 3600}


@pytest.fixture(scope="session")
def standing(cluster):
    """The Airflow."""
    environ = {
        **airflow_environ(RUN_TIMEOUT_S),
        # The demo runs the same DAG with workers that wait.
        "AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE": "True",
    }
    folders = [DAGS, *(REPOSITORY / "tests" / name / "dags" for name in ("chaos", "benchmarks", "system"))]
    standing = Standing(cluster.folder, folders, environ)
    yield standing
    standing.end()


@pytest.fixture(scope="module")
def scene(cluster, standing):
    """No engine; those that runs deploy for themselves are scripted."""
    with ExitStack() as stack:
        yield Scene(cluster, random.Random(0), stack, ENGINE_KWARGS, standing=standing, runs_on=scripted(cluster))
