"""What the processes of one job are given beside their request."""

import json

import fsspec
import pytest
from fsspec.config import conf

from airflow_provider_raylm.cluster import surroundings
from airflow_provider_raylm.cluster.surroundings import Surroundings, hidden


@pytest.fixture
def own_process(monkeypatch):
    """Undo what a process enters for good."""
    monkeypatch.setattr(surroundings, "_entered", Surroundings())
    before = {name: dict(options) for name, options in conf.items()}
    yield
    conf.clear()
    conf.update(before)


def test_a_process_enters_its_surroundings(own_process, monkeypatch, tmp_path):
    """File systems are opened with them, beside what the cluster configures; what it says hides them."""
    (tmp_path / "secret").write_text("fr0m-a-file\n")
    monkeypatch.delenv("RAYLM_OWN", raising=False)
    conf["memory"] = {"skip_instance_cache": True}
    monkeypatch.setenv("RAYLM_OWN", "")
    around = Surroundings(
        secret_env={"RAYLM_OWN": str(tmp_path / "secret")},
        storage={"memory": {"token": {"private_key": 'k"ey'}, "endpoint_url": "http://shown"}},
    )
    around.enter()

    opened = fsspec.filesystem("memory")
    assert opened.storage_options["token"] == {"private_key": 'k"ey'}
    assert conf["memory"]["skip_instance_cache"] is True
    said = json.dumps({"message": 'fr0m-a-file k"ey http://shown'})
    assert hidden(said) == '{"message": "*** *** http://shown"}'
    assert 'k"ey' not in repr(around)


def test_a_pad_comes_with_the_credentials(own_process, monkeypatch):
    """And is taken from where it was left, once; what is known of file systems does not have it."""
    from airflow_provider_raylm.ray_jobs import JobRequest
    from airflow_provider_raylm.wire import HANDED_VARIABLE, handed

    request = JobRequest("id", "preview", {}, storage={"s3": {"key": "k"}}, pad=b"\x00\xff")
    left = {b"gcs://place": handed(request.secrets)}
    monkeypatch.setenv(HANDED_VARIABLE, "gcs://place")
    monkeypatch.setattr(surroundings.internal_kv, "_internal_kv_get", left.get)
    monkeypatch.setattr(surroundings.internal_kv, "_internal_kv_del", left.pop)
    around = surroundings.received([], {})

    assert (around.pad, around.storage, left) == (b"\x00\xff", {"s3": {"key": "k"}}, {})
    assert JobRequest("id", "sweep", {}).secrets == {}
    assert "pad" not in repr(around)
