"""The faults that take a Ray node, or all of Ray."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from airflow_provider_raylm import local
from airflow_provider_raylm.errors import RayLMError
from tests.chaos.faults import end, fault
from tests.chaos.scene import Scene
from tests.clusters import ray_cluster

ROWS = 5_000


@contextmanager
def _second_node(cluster):
    """Add a Ray node to the cluster; yield the id of the session of its processes."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.gcs_address}"),
        *("--num-cpus=2", "--disable-usage-stats"),
    ]
    node = subprocess.Popen(
        command, env=cluster.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield node.pid
    finally:
        local.end_session(node.pid)
        node.wait()


@fault
def node_dies(scene):
    """The one that has the engine, and perhaps the task's stage; another joins, and the task continues there."""
    with ray_cluster(cpus=1, other_nodes=True) as cluster, _second_node(cluster) as node:
        cluster.python = scene.cluster.python
        there = Scene(cluster, scene.chance, scene.stack)
        batch = there.batch(there.table(ROWS))
        with there.accounted(batch, ROWS) as accounts:
            # The head has room for the task, not for the engine.
            there.engine = there.deploy("shared", num_cpus=1.5)
            job = there.start(batch)
            there.at_a_random_moment(batch)
            _kill_session(node)
            died = time.monotonic()
            with _second_node(cluster):
                end(there, job)
                there.retry(batch)
                accounts.recovery_s = time.monotonic() - died
                there.teardown(there.engine)
    return accounts


@fault
def head_restarted(scene):
    """The task fails and says what to do; deployed anew, its retry completes."""
    batch = scene.batch(scene.table(ROWS))
    with scene.accounted(batch, ROWS) as accounts:
        job = scene.start(batch)
        scene.at_a_random_moment(batch)
        processes = scene.cluster.processes()
        _kill_session(scene.cluster.leader)
        died = time.monotonic()
        scene.until(lambda: not any(map(_is_alive, processes)), 60)
        scene.cluster.restart()
        with pytest.raises(RayLMError, match="Ray does not know the job any more"):
            scene.finish(job)
        with pytest.raises(RayLMError, match="Clear the deploy task together with this one"):
            scene.finish(scene.start(batch))
        scene.engine = scene.deploy("shared")
        scene.finish(scene.start(batch))
        accounts.recovery_s = time.monotonic() - died
    return accounts


def _kill_session(leader):
    """Kill without a chance to clean up."""
    for pid in local.session(leader):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_alive(process):
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
