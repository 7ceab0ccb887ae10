"""The workload of the benchmarks that needs an Airflow, with few tasks and short looks, so that it does not rot."""

from tests.benchmarks import deferred


def test_tasks_that_wait_in_the_triggerer(standing, monkeypatch):
    """They ask the dashboard, and somebody's CPU and memory are measured."""
    monkeypatch.setattr(deferred, "SETTLE_S", 3.0)
    monkeypatch.setattr(deferred, "MEASURED_S", 5.0)
    found = deferred.deferred_on(standing.airflow, (1, 3))

    assert set(found["contenders"]) == {"tasks_1", "tasks_3"}
    for measured in found["contenders"].values():
        assert measured["requests_per_s"] > 0
        assert measured["triggerer_rss_mb"] > 50
