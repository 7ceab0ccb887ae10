"""The router in Serve, between real handles and replicas that answer a block after a fixed time."""

import json

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def said(cluster):
    """What a job saw of 4 replicas, and of 8."""
    script = REPOSITORY / "tests" / "integration" / "route_blocks.py"
    log = cluster.run_script(script, "airflow_provider_raylm.cluster.routing.RowsRouter", 4, 8)
    return json.loads(next(line for line in log.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("replicas", ["4", "8"])
def test_equal_blocks_are_spread_evenly(said, replicas):
    """With two blocks in flight for each replica, as a task has them at least."""
    assert said["balance"][replicas]["rate"] >= 0.95


def test_names_keep_their_replicas(said):
    """Steps of a block stay together while no replica is idle; numbers are replicas."""
    assert said["steps_at_home"] >= 0.75
    assert said["replicas_of_all_blocks"] == 8
    assert said["replicas_per_number"] == 1
    assert said["replicas_of_all_numbers"] == 8


def test_a_killed_replica_is_not_asked_again(said):
    """What it had is answered by others, and what has its name finds a new home."""
    assert not said["killed_answers"]
    assert said["homes_after_kill"] == 1
    assert said["failures_after_kill"] == 0


def test_a_new_replica_gets_work_at_once(said):
    """As soon as it runs; half of the blocks had a name, whose replica was another one."""
    assert said["new_replica_answers"]
