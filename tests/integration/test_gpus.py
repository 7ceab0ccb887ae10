"""GPUs without a GPU: Ray places by what nodes say they have."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SPECS = [
    # Three replicas on two GPUs: at least two of them share one.
    {"name": "shared", "gpus_per_worker": 0.5, "num_cpus": 0.5, "replicas": 3},
    {"name": "wide", "tensor_parallel_size": 2, "accelerator_type": "H100"},
]


@pytest.fixture(scope="module")
def places():
    """Node and GPUs of each worker, by engine and replica."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integration.claimed_gpus", json.dumps(SPECS)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_engines_share_a_gpu(places):
    """A worker that asks for a whole GPU does not fit into half of one."""
    gpus = [(node, *ids) for replica in places["shared"] for node, ids in replica]

    assert len(gpus) == 3
    assert len(set(gpus)) == 2


def test_an_engine_wider_than_a_node_spreads(places):
    """A worker on each, as nothing else is left."""
    [replica] = places["wide"]

    assert len({node for node, _ in replica}) == len(replica) == 2
    assert all(len(ids) == 1 for _, ids in replica)
