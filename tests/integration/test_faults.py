"""Faults of the chaos suite, with few rows, on an engine without vLLM, so that they do not rot between long runs.

Of faults that are alike, one; those that need vLLM's own processes or an Airflow are in other tests.
"""

import random
from contextlib import ExitStack

import pytest

from tests.chaos import faults
from tests.chaos.scene import Scene, application
from tests.conftest import REPOSITORY
from tests.scripted import REF

FAULTS = ["driver_killed", "poison_rows", "disk_full", "two_attempts_at_once", "driver_killed_on_s3"]


class ScriptedScene(Scene):
    """A scene whose engines are scripted."""

    def deploy(self, name, **fields):
        witness = fields.get("env", {}).get("RAYLM_WITNESS", self.witness)
        self.cluster.run_script(REPOSITORY / "tests" / "chaos" / "scripted_engine.py", application(name), witness)
        return {**REF.model_dump(mode="json"), "application": application(name), "deployment": "engine"}


@pytest.fixture(scope="module")
def scene(cluster, s3):
    """A scene on the shared cluster, with an engine of its own."""
    with ExitStack() as stack:
        scene = ScriptedScene(cluster, random.Random(7), stack, s3=s3)
        scene.engine = scene.deploy("scripted")
        yield scene
        scene.teardown(scene.engine)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(scene, name, monkeypatch):
    """No row is lost or doubled, and nothing is left."""
    for constant, value in {"ROWS": 1_500, "KILLED_ROWS": 1_500, "POISONED_ROWS": 800, "KILLS": 2}.items():
        monkeypatch.setattr(faults, constant, value)
    monkeypatch.setattr(faults, "SMALL_DISK", "48k")
    accounts = faults.FAULTS[name](scene)

    assert accounts.rows_lost == accounts.rows_duplicated == 0
    assert accounts.rows_written + accounts.rows_quarantined == accounts.rows_expected
    assert scene.engines() == set()
