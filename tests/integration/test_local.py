"""``raylm://local``: a Ray head on this machine, started when none answers."""

import shutil
import tempfile
from pathlib import Path

import pytest

from airflow_provider_raylm import local
from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from tests.clusters import Cluster, own_port

PORT = own_port()


@pytest.fixture
def folder(monkeypatch):
    # Not tmp_path: the paths of Ray's sockets must stay short.
    folder = Path(tempfile.mkdtemp(prefix="raylm-local-")) / "ray"
    monkeypatch.setattr(local, "default_folder", lambda: folder)
    monkeypatch.setenv("AIRFLOW_CONN_RAYLM_LOCAL", f"raylm://local:{PORT}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield folder
    local.stop(folder)
    shutil.rmtree(folder.parent, ignore_errors=True)


def test_a_local_cluster_is_started_once_and_stopped(folder):
    """The second connection finds the first one's head; stopping leaves no process."""
    assert RayLMHook("raylm_local").test_connection() == (True, f"Ray 2.60.0 answers at http://127.0.0.1:{PORT}")
    first = (folder / "cluster.json").read_text()
    assert RayLMHook("raylm_local").test_connection()[0]
    assert (folder / "cluster.json").read_text() == first

    cluster = Cluster(folder.parent, f"http://127.0.0.1:{PORT}", None, {})
    leader = cluster.leader
    assert len(local.session(leader)) > 5
    assert cluster.listening_beyond_loopback() == []
    local.stop(folder)
    assert local.session(leader) == []
    local.stop(folder)


def test_a_head_that_cannot_start_says_why(folder):
    """Ray's last words, and nothing left."""
    with pytest.raises(ClusterError, match=r"(?s)did not come up at http://127\.0\.0\.1:10500.*worker_ports"):
        local.start(folder, 10_500)
    assert not (folder / "cluster.json").exists()
