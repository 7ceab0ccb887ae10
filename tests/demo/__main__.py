"""The quickstart on real parts: a model made here, a local Ray, a real Airflow, and what came of it as a table.

Ends with one line and status 0, or names the step that failed. Nothing is left running.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from airflow_provider_raylm.wire import progress_in
from tests.clusters import Cluster, ray_cluster
from tests.demo import data
from tests.demo.page import write_page
from tests.standalone import Airflow, standalone

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "demo"
DAG = "raylm_quickstart"
TASKS = ("label", "keywords", "reply")
CONTEXT_LENGTH = 1024
RUN_TIMEOUT_S = 600.0
LEAST_ACCURACY = 0.95
# Rows of each task on the page.
SHOWN = 8


class StepError(Exception):
    """A step of the demo did not do what it is for."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what is being done and for how long; a failure carries the step's name."""
    started = time.monotonic()
    print(f"demo: {name} ...", flush=True)
    try:
        yield
    except Exception as error:
        raise StepError(f"{name}: {type(error).__name__}: {error}") from error
    print(f"demo: {name} done in {time.monotonic() - started:.0f} s", flush=True)


def make_model(folder: Path) -> None:
    """Train the demo's model, in a process of its own so that its threads and memory end with it."""
    command = [sys.executable, "-m", "tests.demo.model", str(folder)]
    subprocess.run(command, check=True, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_dag(airflow: Airflow, cluster: Cluster, model: Path, source: Path) -> dict[str, dict[str, Any]]:
    """Run the quickstart and return what each task returned."""
    output = cluster.folder / "out"
    conf = {
        "model": str(model),
        "gpus": 0,
        "engine_kwargs": {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT_LENGTH},
        "source": f"{source}/*.parquet",
        "output": str(output),
    }
    run = airflow.trigger(DAG, conf)
    with progress(airflow, cluster, run):
        state = airflow.wait(DAG, run, RUN_TIMEOUT_S)
    states = airflow.states(DAG, run)
    if state != "success":
        failed = [task for task, end in states.items() if end == "failed"]
        logs = "\n".join(airflow.log(DAG, run, task)[-2000:] for task in failed)
        raise StepError(f"the run ended as {state}: {states}\n{logs}")
    return {task: airflow.xcom(DAG, run, task) for task in states}


@contextmanager
def progress(airflow: Airflow, cluster: Cluster, run: str) -> Iterator[None]:
    """Print each task's state when it changes, and how far its job is, while the body runs."""
    over = Event()
    said: dict[str, Any] = {}

    def say(name: str, words: Any) -> None:
        if words is not None and said.get(name) != words:
            said[name] = words
            print(f"demo:   {name}: {words}", flush=True)

    def look() -> None:
        while not over.wait(1):
            # Neither has to answer: the run continues, and the next look comes.
            with suppress(Exception), closing(cluster.client()) as jobs:
                for task, state in airflow.states(DAG, run).items():
                    say(task, state)
                for job in jobs.all_jobs():
                    told = progress_in(jobs.logs(job.submission_id, 5)) if job.info.status == "RUNNING" else ()
                    if told:
                        say(f"{job.info.metadata['task_id']}, so far", told[-1].line())

    watcher = Thread(target=look, name="demo-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(10)


def page(cluster: Cluster, results: dict[str, dict[str, Any]], shares: dict[str, float]) -> Path:
    """Write the page and return its path."""
    with closing(cluster.client()) as jobs:
        ran = [
            (job.info.metadata.get("task_id", ""), job.info.submitted_at, job.ended_at)
            for job in jobs.all_jobs()
            if job.info.metadata.get("task_id") in results and job.info.submitted_at and job.ended_at
        ]
    tasks = {
        task: {
            "rows": results[task]["rows_in"],
            "failed": results[task]["rows_quarantined"],
            "generated tokens": results[task]["completion_tokens"],
            "rows/s": results[task]["rows_in"] / results[task]["seconds"],
            "right": f"{shares[task]:.1%}",
        }
        for task in TASKS
    }
    rows = {
        task: [(row["text"], row[task]) for row in answers(results[task]).to_pylist() if row["kind"] == "review"][
            :SHOWN
        ]
        for task in TASKS
    }
    return write_page(BUILD / "index.html", sorted(ran, key=lambda job: job[1]), tasks, rows)


def answers(report: dict[str, Any]) -> pa.Table:
    """Return a task's output in input order."""
    return ds.dataset(report["output"], format="parquet").to_table().sort_by("raylm_row_id")


def accuracy(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the share of reviews that each task answered rightly; an answer on the wrong row would be wrong."""
    labels, keywords, replies = (answers(results[task]).to_pylist() for task in TASKS)
    reviews = [row for row in labels if row["kind"] == "review"]
    right = {
        "label": sum(row["label"] == row["expected_label"] for row in reviews),
        "keywords": sum(
            row["keywords"].startswith(f"{row['product']},") for row in keywords if row["kind"] == "review"
        ),
        "reply": sum(
            row["product"] in row["reply"] and row["reply"].startswith("Thank") == (row["label"] == "positive")
            for row in replies
            if row["kind"] == "review"
        ),
    }
    return {task: count / len(reviews) for task, count in right.items()}


def show(results: dict[str, dict[str, Any]], shares: dict[str, float]) -> None:
    """Print the table and a few rows of each task."""
    print(f"\n{'task':<10}{'rows':>8}{'failed':>8}{'tokens':>10}{'rows/s':>9}{'right':>9}")
    for task in TASKS:
        report = results[task]
        rate = report["rows_in"] / report["seconds"]
        print(
            f"{task:<10}{report['rows_in']:>8}{report['rows_quarantined']:>8}{report['completion_tokens']:>10}"
            f"{rate:>9.0f}{shares[task]:>9.1%}"
        )
    for task in TASKS:
        print(f"\n{task}: {results[task]['failures'] or 'no failures'}")
        reviews = [row for row in answers(results[task]).to_pylist() if row["kind"] == "review"]
        for row in reviews[:3]:
            print(f"  {row[task]!r:<50} <- {row['text'][:60]!r}")
    print()


def engines_started(cluster: Cluster) -> int:
    """Count the engine replicas that ever wrote a log on this cluster."""
    return len(list((cluster.folder / "ray").glob("session_2*/logs/serve/replica_*_engine_*.log")))


def main() -> int:
    """Run the demo; return the exit status."""
    started = time.monotonic()
    model, source, home = BUILD / "model", BUILD / "input", BUILD / "airflow"
    shutil.rmtree(home, ignore_errors=True)
    try:
        with ExitStack() as stack:
            with step("make the model and the input, start Ray and Airflow"), ThreadPoolExecutor() as pool:
                # Training takes one core: the other one starts what is needed afterwards.
                trained = pool.submit(make_model, model)
                data.write_inputs(source, review_count=400)
                cluster = stack.enter_context(ray_cluster())
                environ = {"AIRFLOW_CONN_RAYLM_DEFAULT": cluster.connection_uri()}
                airflow = stack.enter_context(standalone(home, [REPOSITORY / "dags"], environ))
                trained.result()
            with step(f"run {DAG} through Airflow"):
                results = run_dag(airflow, cluster, model, source)
            with step("check what is left and what was answered"):
                nobody = {
                    "delete": [],
                    "max_age": None,
                    "installation": results["deploy_reviewer"]["labels"]["installation"],
                }
                leaked = len(cluster.run("sweep", nobody)["engines"])
                engines = engines_started(cluster)
                shares = accuracy(results)
                show(results, shares)
                shown = page(cluster, results, shares)
                if leaked or engines != 1:
                    raise StepError(f"{engines} engines were started, {leaked} are left")
                if min(shares.values()) < LEAST_ACCURACY:
                    raise StepError(f"less than {LEAST_ACCURACY:.0%} of a task's answers are right: {shares}")
    except StepError as error:
        print(f"demo: FAILED in step {error}", file=sys.stderr)
        return 1
    rows = sum(results[task]["rows_in"] for task in TASKS)
    failed = sum(results[task]["rows_quarantined"] for task in TASKS)
    print(f"demo: see {shown}")
    print(f"demo: took {time.monotonic() - started:.0f} s")
    print(f"demo: OK engines_started={engines} tasks={len(TASKS)} rows={rows} failed={failed} leaked_engines={leaked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
