"""An engine that dies while it works: every row is answered once, and correctly, all the same."""

import random
import time
from contextlib import ExitStack, closing

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.chaos.scene import Scene

ROWS = 4_000


def at_work(cluster, engine, folder, **fields):
    """Start a task and wait for its first part; return its batch and its job."""
    (folder / "in.txt").write_text("".join(f"line {i}\n" for i in range(ROWS)))
    batch = {"source": str(folder / "in.txt"), "prompt": "Say: ${text}", "output": str(folder / "out")}
    batch |= {"temperature": 0, "block_rows": 100, **fields}
    job = cluster.start("infer", {"engine": engine, "batch": batch})
    end = time.monotonic() + 120
    while not list((folder / "out").glob("part-*")) and time.monotonic() < end:
        time.sleep(0.05)
    return batch, job


@pytest.mark.parametrize("victim", ["replicas", "engine_cores"])
def test_rows_on_their_way_are_asked_again(cluster, engine, tmp_path, victim):
    """By the same attempt of the task; what was written before is not asked again."""
    batch, job = at_work(cluster, engine, tmp_path, max_tokens=8)
    (before,) = cluster.replicas(engine["application"])
    (process,) = getattr(cluster, victim)(engine["application"])
    family = [process, *process.children(recursive=True)]
    process.kill()
    nothing = {"delete": [], "max_age": None, "installation": "tests"}
    (info,) = cluster.run("sweep", nothing)["engines"]
    report, said = cluster.finish(job)

    table = ds.dataset(str(tmp_path / "out"), format="parquet").to_table()
    assert sorted(table["text"].to_pylist()) == sorted(f"line {i}" for i in range(ROWS))
    assert (report["rows_written"], report["rows_quarantined"]) == (ROWS, 0)
    assert [now.pid for now in cluster.replicas(engine["application"])] != [before.pid]
    assert info["working"] == [batch["output"]], "a teardown would not have waited for the task"
    assert not any(process.is_running() for process in family), "the dead engine left a process"
    assert all(pq.read_metadata(part).num_rows == 100 for part in (tmp_path / "out").glob("part-*"))
    # A killed engine core shows in Serve's status only at its next health check.
    if victim == "replicas":
        assert any("the engine is not well" in line for line in said), said


def test_what_a_stopped_job_has_asked_is_given_up(cluster, engine, tmp_path):
    """By the engine itself, which would be busy with it for a minute."""
    _, job = at_work(cluster, engine, tmp_path, max_tokens=256, ignore_eos=True)
    with closing(cluster.client()) as jobs:
        jobs.stop(job)

    with ExitStack() as stack:
        scene = Scene(cluster, random.Random(0), stack, engine=engine)
        scene.until(scene.is_idle, 20)
