"""Two runs of a DAG at once, each with an engine of its own and mapped tasks on it; and what is cleared afterwards."""

import shutil
from pathlib import Path

import pytest

from tests.chaos.scene import written

DAG_ID = "chaos_partitions"
PARTITIONS = 2
ROWS = 100
RUN_TIMEOUT_S = 400


class Runs:
    """Two runs that were started one after the other, with the folders that they wrote."""

    def __init__(self, scene):
        self.scene = scene
        self.sources = [scene.table(ROWS) for _ in range(PARTITIONS)]
        batch = {**scene.batch("unused"), "source": [str(source) for source in self.sources], "max_tokens": 8}
        conf = {"engine": scene.spec("own"), "batch": batch}
        self.ids = [scene.airflow.trigger(DAG_ID, conf) for _ in range(2)]

    def wait(self, run):
        state = self.scene.airflow.wait(DAG_ID, run, RUN_TIMEOUT_S)
        assert state == "success", self.scene.airflow.states(DAG_ID, run)

    def engine(self, run):
        return self.scene.airflow.xcom(DAG_ID, run, "deploy")["application"]

    def outputs(self, run):
        return [Path(f"{source}-{run}") for source in self.sources]


@pytest.fixture(scope="module")
def runs(scene):
    runs = Runs(scene)
    for run in runs.ids:
        runs.wait(run)
    return runs


def test_each_has_its_engine_and_every_partition_its_rows(scene, runs):
    """And neither leaves anything."""
    first, second = map(runs.engine, runs.ids)
    assert first != second
    for run in runs.ids:
        for output in runs.outputs(run):
            rows = written(output)
            assert (len(rows), len(set(rows))) == (ROWS, ROWS)
    assert not scene.engines()


@pytest.mark.parametrize("task", ["work", "teardown", "deploy"])
def test_clearing_leaves_no_engine(scene, runs, task):
    """With the work Airflow clears its setup and its teardown, and with the setup the teardown."""
    run, _ = runs.ids
    if task == "work":
        for output in runs.outputs(run):
            shutil.rmtree(output)
    scene.airflow.clear(DAG_ID, run, task)
    runs.wait(run)

    assert not scene.engines()
    assert [len(written(output)) for output in runs.outputs(run)] == [ROWS] * PARTITIONS
