"""Every workload of the benchmarks, on an engine that answers at once: none of them rots between two measurements."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import planning
from tests.benchmarks.harness import HERE, Bench
from tests.benchmarks.workloads import WORKLOADS

ROWS = 40


@pytest.fixture(scope="module")
def bench(cluster):
    """A bench whose shared engine has nothing behind it."""
    bench = Bench(cluster, Path(), {}, 0, 0)
    bench.engine = benchmarks.deploy_null(bench)
    with pytest.MonkeyPatch.context() as patch:
        # A measured job is looked at as seldom as operators do; here it is only waited for.
        patch.setitem(Bench.ours.__kwdefaults__, "poll_interval", 0.3)
        yield bench
    bench.teardown(bench.engine)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload(bench, name):
    """Its own side: every row is answered, with all its tokens, and the ratios can be worked out."""
    workload = replace(WORKLOADS[name], rows=ROWS, contenders=("ours",))
    result = benchmarks.side_by_side(bench, workload, name, repeats=1)

    assert result["contenders"]["ours"]["completion_tokens"] == workload.new_tokens


def test_the_single_ones(bench, monkeypatch):
    """With few rows and windows."""
    monkeypatch.setattr(benchmarks, "ROWS_PER_TASK", ROWS)
    monkeypatch.setattr(benchmarks, "CONCURRENCY_ROWS", 600)
    monkeypatch.setattr(benchmarks, "QUICK_TASKS", 1)
    monkeypatch.setattr(benchmarks, "WINDOWS", (128, 256))
    monkeypatch.setattr(benchmarks, "TASKS_AT_A_TIME", (1, 2))
    # The whole DAG's smoke has the empty job, which takes half a minute.
    monkeypatch.setattr(bench.cluster, "run_script", lambda *_: None)
    results = {name: single(bench, 1, quick=True) for name, single in benchmarks.SINGLES.items()}
    monkeypatch.undo()
    results["null"] = benchmarks.null(bench, (ROWS, 2 * ROWS))

    assert set(results) == {"many", "concurrency", "null"}
    for name, result in results.items():
        assert all(value >= 0 for value in result["ratios"].values() if isinstance(value, float)), name


def test_the_whole_dag(bench, monkeypatch):
    """Its own side, on an engine that is there already."""
    monkeypatch.setattr(benchmarks, "DAG_ROWS", ROWS)
    monkeypatch.setattr(bench, "deploy", lambda name: bench.engine)
    monkeypatch.setattr(bench, "teardown", lambda engine: None)
    monkeypatch.setattr(bench, "processor", lambda *_: None)

    assert benchmarks.dag(bench)["ratios"]["ours_vs_private_wall"] > 0


def test_planning_and_resume():
    """With few files and rows; what a file costs is one request."""
    assert planning.planning(300)["ratios"]["requests_per_file"] <= 2
    assert planning.resume(1_000_000)["ratios"]["peak_rss_mb"] < 1024


def test_every_workload_is_here():
    """One that is added to the benchmarks needs a smoke, too; what a real Airflow needs is in the system tests."""
    assert set(benchmarks.EVERY) == {*WORKLOADS, "many", "concurrency", "null", "dag", "planning", "resume", "deferred"}
    assert HERE.is_dir()
