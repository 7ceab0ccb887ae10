"""Every fault of the chaos suite, with few rows, on engines without vLLM: none of them rots between two long runs.

Those in which Airflow has a part are in tests/system.
"""

import random
from contextlib import ExitStack

import pytest

from tests.chaos import cluster_faults, faults
from tests.chaos.faults import FAULTS
from tests.chaos.scene import Scene
from tests.chaos.scripted_engine import LOADS_FOR, scripted
from tests.clusters import ray_cluster
from tests.system import test_interruptions, test_without_airflow

MODULES = {faults.__name__, cluster_faults.__name__}
HARM_THEIR_CLUSTER = ["head_restarted"]
# Another fault is the same but that its rows lie on S3, where more can go wrong.
TWINS = {name: f"{name}_on_s3" for name in ("driver_killed", "job_killed_twenty_times")}
HARM_NONE = [
    name for name, one in FAULTS.items() if one.__module__ in MODULES and name not in (*HARM_THEIR_CLUSTER, *TWINS)
]
FEW = {
    "ROWS": 1_200,
    "KILLED_ROWS": 1_200,
    "POISONED_ROWS": 800,
    "KILLS": 1,
    "MUCH_TOKENS": 400,
    "LITTLE_ROWS": 320,
    "SMALL_DISK": "48k",
    # It is loading when its deploy is killed.
    "HALF": {"env": {LOADS_FOR: "600"}},
    "DEPLOY_S": 1,
    "TEARDOWN_S": 2,
}
# A third of it is what Serve waits for one of three looks.
HANG_TIMEOUT_S = 6


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Let every fault have few rows, and wait for little."""
    for name, value in FEW.items():
        monkeypatch.setattr(faults, name, value)
    monkeypatch.setattr(cluster_faults, "ROWS", FEW["ROWS"])


@pytest.fixture(scope="module")
def scene(cluster, s3):
    """A scene on the shared cluster, with an engine of its own."""
    with ExitStack() as stack:
        scene = Scene(scripted(cluster), random.Random(7), stack, s3=s3)
        scene.engine = scene.deploy("scripted", hang_timeout=HANG_TIMEOUT_S)
        yield scene
        scene.teardown(scene.engine)


def check(scene, name):
    """No row is lost or doubled, and nothing is left."""
    accounts = FAULTS[name](scene)

    assert accounts.rows_lost == accounts.rows_duplicated == 0
    assert accounts.rows_written + accounts.rows_quarantined == accounts.rows_expected
    assert scene.engines() == set()
    assert scene.strays_after_a_while() == 0


@pytest.mark.parametrize("name", HARM_NONE)
def test_a_fault(scene, name):
    """On the shared cluster, or one that the fault makes."""
    check(scene, name)


@pytest.mark.parametrize("name", HARM_THEIR_CLUSTER)
def test_a_fault_of_a_cluster(name):
    """On one that nobody else has."""
    with ray_cluster() as cluster, ExitStack() as stack:
        scene = Scene(scripted(cluster), random.Random(7), stack)
        scene.engine = scene.deploy("scripted")
        check(scene, name)


def test_every_fault_has_a_smoke():
    """Here or in the system tests."""
    elsewhere = [one.__name__ for one in (*test_interruptions.FAULTS, *test_without_airflow.FAULTS)]
    assert sorted([*HARM_NONE, *HARM_THEIR_CLUSTER, *TWINS, *elsewhere]) == sorted(FAULTS)
    assert set(TWINS.values()) <= set(HARM_NONE)
