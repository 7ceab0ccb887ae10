"""What planning costs: many small files behind a round trip each, and the resumption of very many rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
FILES = 20_000
ROWS_PER_FILE = 10
ROUND_TRIP_S = 0.04
ROWS = 100_000_000
BLOCK_ROWS = 256


def planning(files: int = FILES) -> dict[str, Any]:
    """Plan *files* small Parquet files behind 40 ms per request, until the first block is read."""
    found = {}
    for number in (files // 10, files):
        with _light_s3(number) as (environ, requests):
            found[f"files_{number}"] = _in_a_process("_plan_files", environ)
            total, pages = requests()
            found[f"files_{number}"] |= {"requests_per_file": round((total - pages) / number, 3), "pages": pages}
        print(f"bench: planning {number} {found[f'files_{number}']}", flush=True)
    few, many = found.values()
    ratios = {
        "requests_per_file": many["requests_per_file"],
        "first_block_s": many["first_block_s"],
        "memory_growth_mb_per_1000_files": round(
            (many["peak_rss_mb"] - few["peak_rss_mb"]) / (files - files // 10) * 1000, 3
        ),
    }
    return {"contenders": found, "ratios": ratios}


def resume(rows: int = ROWS) -> dict[str, Any]:
    """Plan and resume a task of *rows* rows of which nearly all are done; source and listing are scripted."""
    found = _in_a_process("_resume_rows", {"RAYLM_BENCH_ROWS": str(rows)})
    print(f"bench: resume {rows} {found}", flush=True)
    return {"contenders": {f"rows_{rows}": found}, "ratios": found}


def _in_a_process(function: str, environ: dict[str, str]) -> dict[str, float]:
    """Run one of this module's functions in a process of its own, whose memory is then its own."""
    code = f"from tests.benchmarks import planning; print(planning.{function}())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environ}, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = eval(done.stdout.splitlines()[-1])
    return found


def _plan_files() -> dict[str, float]:
    from airflow_provider_raylm.cluster.batch.plan import make_plan
    from airflow_provider_raylm.cluster.batch.reader import read_blocks
    from airflow_provider_raylm.specs import BatchSpec

    spec = BatchSpec(source="s3://bucket/in", output="s3://bucket/out", prompt="${text}", block_rows=BLOCK_ROWS)
    started = time.monotonic()
    plan = make_plan(spec, lambda line: None)
    planned = time.monotonic()
    name, rows = next(read_blocks(plan, lambda name: True))
    assert rows.num_rows == BLOCK_ROWS // ROWS_PER_FILE * ROWS_PER_FILE, (name, rows.num_rows)
    return {
        "plan_s": round(planned - started, 2),
        "first_block_s": round(time.monotonic() - started, 2),
        "peak_rss_mb": _peak_rss_mb(),
    }


def _resume_rows() -> dict[str, float]:
    from airflow_provider_raylm.cluster.batch.fragments import File, Fragment, Reading
    from airflow_provider_raylm.cluster.batch.output import Output
    from airflow_provider_raylm.cluster.batch.parts import Parts
    from airflow_provider_raylm.cluster.batch.plan import Plan
    from airflow_provider_raylm.specs import BatchSpec

    rows = int(os.environ["RAYLM_BENCH_ROWS"])
    before = _peak_rss_mb()
    started = time.monotonic()
    per_file = 1_000_000
    fragments = [
        Fragment(n, File(f"s3://b/in/{n}.parquet", "parquet", None, 1 << 30, "v"), min(per_file, rows - n * per_file))
        for n in range(-(-rows // per_file))
    ]
    plan = Plan(fragments, pa.schema([("text", pa.string())]), Reading(), BLOCK_ROWS)
    # The listing of an output in which every hundredth block is missing and every thousandth has failed rows, too.
    answers, failed = [], []
    for number, block in enumerate(plan.blocks()):
        part = f"part-{plan.name(block.fragments[0], block.first)}-{block.rows}.parquet"
        if number % 100:
            answers.append(part)
        if number % 1000 == 1:
            failed.append(part)

    class Scripted(Parts):
        def names(self) -> tuple[list[str], list[str]]:
            return answers, failed

    output = Output(BatchSpec(source="s3://b/in", output="s3://b/out", prompt="${text}"), "mark")
    output.parts = Scripted(output.parts.answers, output.parts.quarantine, "parquet")
    progress = output.progress(BLOCK_ROWS)
    left = [block for block in plan.blocks() if plan.name(block.fragments[0], block.first) not in progress.done]
    missing = sum(block.rows or 0 for block in left)
    assert missing + sum(progress.done.values()) == plan.rows == rows
    return {
        "resume_s": round(time.monotonic() - started, 2),
        "rows_left": missing,
        "memory_mb": round(_peak_rss_mb() - before, 1),
        "peak_rss_mb": _peak_rss_mb(),
    }


def _peak_rss_mb() -> float:
    # Of this program alone: getrusage's begins with what the parent had when it forked.
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(told.split()[1]) / 1024, 1)


@contextmanager
def _light_s3(objects: int) -> Iterator[tuple[dict[str, str], Any]]:
    with TemporaryDirectory(prefix="raylm-") as folder:
        file = Path(folder) / "a.parquet"
        pq.write_table(pa.table({"text": [f"some text of row {i}" for i in range(ROWS_PER_FILE)]}), file)
        command = [sys.executable, "-m", "tests.benchmarks.light_s3", str(file), str(objects), str(ROUND_TRIP_S)]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            lines = server.stdout
            environ = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{lines.readline().strip()}",
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_DEFAULT_REGION": "us-east-1",
            }

            def requests() -> list[int]:
                server.terminate()
                return [int(number) for number in lines.readline().split()]

            try:
                yield environ, requests
            finally:
                server.kill()
