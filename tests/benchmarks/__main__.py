"""Throughput side by side: this provider, Ray Data's own ways to the engine, and vLLM alone.

Writes build/bench/bench.json and plots beside it, and prints a table of the ratios with their bars.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks import plots
from tests.benchmarks.harness import HERE, REPOSITORY, Bench, Timing, as_json, sampling
from tests.benchmarks.workloads import WORKLOADS, Workload
from tests.clusters import ray_cluster
from tests.tiny_model import make_tiny_model

OUT = REPOSITORY / "build" / "bench"
REPEATS = 3
CONTEXT_LENGTH = 1024
ENGINE_KWARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": CONTEXT_LENGTH}
MODELS: dict[str, dict[str, int]] = {
    "tiny": {},
    # 8 layers of width 448 and a vocabulary of 1,000: about 18 million parameters.
    "small": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 14},
}
NULL_ROWS = (100_000, 1_000_000)
TASKS = 20
ROWS_PER_TASK = 100
DAG_ROWS = 500
WINDOWS = (256, 512, 1024, 2048, 4096)

Result = dict[str, Any]


def side_by_side(bench: Bench, workload: Workload, name: str, repeats: int) -> Result:
    """Run the contenders in turn, *repeats* times, and return medians and ratios of pairs."""
    timings: dict[str, list[Timing]] = {contender: [] for contender in workload.contenders}
    for repeat in range(repeats):
        for contender in workload.contenders:
            source = workload.write(
                bench.cluster.folder / "in" / f"{name}-{contender}-{repeat}", f"{contender[:3]}{repeat}"
            )
            timing = bench.run(contender, workload, source)
            shutil.rmtree(source)
            expected = workload.rows * workload.max_tokens
            if timing.completion_tokens != expected:
                raise RuntimeError(f"{contender} generated {timing.completion_tokens} tokens, not {expected}")
            print(f"bench: {name} {contender} {as_json(timing)}", flush=True)
            timings[contender].append(timing)
    return {"contenders": {c: _median(t) for c, t in timings.items()}, "ratios": _ratios(timings)}


def _median(timings: list[Timing]) -> dict[str, Any]:
    values = [as_json(timing) for timing in timings]
    medians = {field: statistics.median(value[field] for value in values) for field in values[0]}
    return {**medians, "rows_per_s_all": [value["rows_per_s"] for value in values]}


def _ratios(timings: Mapping[str, list[Timing]]) -> dict[str, float]:
    """Return ours against each other contender: the median over the repeats of what ran side by side."""
    ratios = {}
    for other in timings:
        if other != "ours":
            pairs = zip(timings["ours"], timings[other], strict=True)
            ratios[f"ours_vs_{other}"] = round(statistics.median(a.rows_per_s / b.rows_per_s for a, b in pairs), 3)
    return ratios


def null(bench: Bench, sizes: tuple[int, ...]) -> Result:
    """The pipeline alone, on an engine that answers at once: rows/s, and memory at two sizes."""
    application = "benchmark-null"
    bench.cluster.run_script(HERE / "null_engine.py", application)
    labels = {"installation": "benchmark", "dag_id": "benchmark", "run_id": "null", "engine": "null"}
    bench.engine = {
        "application": application,
        "deployment": "engine",
        "model": "null",
        "fingerprint": "null",
        "labels": labels,
        "lease": {},
    }
    contenders = {}
    # The first task on a cluster starts Ray Data's own actors, which stay: they are not this one's memory.
    for rows in (1_000, *sizes):
        workload = Workload(rows, 1, ("ours",), {})
        source = workload.write(bench.cluster.folder / "in" / f"null-{rows}", "null")
        contenders[f"ours_{rows}"] = as_json(bench.ours(workload, source))
        shutil.rmtree(source)
        print(f"bench: null {rows} {contenders[f'ours_{rows}']}", flush=True)
    del contenders["ours_1000"]
    least, most = (contenders[f"ours_{rows}"] for rows in (sizes[0], sizes[-1]))
    ratios = {"rows_per_s": most["rows_per_s"]}
    if len(sizes) > 1:
        ratios["memory_growth"] = round(most["peak_rss_mb"] / least["peak_rss_mb"], 3)
    return {"contenders": contenders, "ratios": ratios}


def many(bench: Bench, quick: bool) -> Result:
    """What a small task costs on a warm engine, beside a Ray job that only reads and writes the same rows."""
    workload = Workload(ROWS_PER_TASK, 16, ("ours",), {})
    ours, empty = [], []
    for number in range(3 if quick else TASKS):
        source = workload.write(bench.cluster.folder / "in" / f"many-{number}", f"many{number}")
        ours.append(bench.ours(workload, source).total_s)
        started = time.time()
        bench.cluster.run_script(HERE / "copy_rows.py", source, bench.cluster.folder / "copied" / str(number))
        empty.append(time.time() - started)
        print(f"bench: many {number}: ours {ours[-1]:.1f} s, empty job {empty[-1]:.1f} s", flush=True)
    contenders = {
        name: {"total_s": round(statistics.median(seconds), 3)}
        for name, seconds in (("ours", ours), ("empty_job", empty))
    }
    ratio = statistics.median(a / b for a, b in zip(ours, empty, strict=True))
    return {"contenders": contenders, "ratios": {"ours_vs_empty_job": round(ratio, 3)}}


def concurrency(bench: Bench, quick: bool) -> Result:
    """Rows/s against the window, with one and with two tasks at a time."""
    workload = Workload(5_000, 16, ("ours",), {})
    contenders = {}
    for window in (None, *(WINDOWS[:: len(WINDOWS) - 1] if quick else WINDOWS)):
        source = workload.write(bench.cluster.folder / "in" / f"window-{window}", f"win{window}")
        timing = bench.ours(workload, source, in_flight_rows=window, block_rows=64 if window else 256)
        contenders[f"window_{window or 'default'}"] = as_json(timing)
        print(f"bench: concurrency {window} {timing.rows_per_s:.0f} rows/s", flush=True)
    rates = [contenders[f"window_{window}"]["rows_per_s"] for window in WINDOWS if f"window_{window}" in contenders]
    return {"contenders": contenders, "ratios": {"widest_vs_best": round(rates[-1] / max(rates), 3)}}


def dag(bench: Bench) -> Result:
    """Three tasks, two of them side by side, with everything: one shared engine, or one for each task."""
    workload = Workload(DAG_ROWS, 16, ("ours",), {})
    sources = [workload.write(bench.cluster.folder / "in" / f"dag-{n}", f"dag{n}") for n in range(3)]
    started = time.time()
    engine = bench.deploy("dag")
    jobs = []
    for number, source in enumerate(sources):
        batch = {
            "source": str(source),
            "prompt": "${text}",
            "output": str(bench.cluster.folder / f"dag{number}"),
            **sampling(workload),
        }
        jobs.append(bench.cluster.start("infer", {"engine": engine, "batch": batch}))
        if number:
            for job in jobs:
                bench.cluster.finish(job)
            jobs.clear()
    bench.teardown(engine)
    ours = time.time() - started
    print(f"bench: dag ours {ours:.0f} s", flush=True)
    started = time.time()
    for source in sources:
        bench.processor("private", workload, source)
    private = time.time() - started
    print(f"bench: dag private {private:.0f} s", flush=True)
    contenders = {"ours": {"total_s": round(ours, 1)}, "private": {"total_s": round(private, 1)}}
    return {"contenders": contenders, "ratios": {"ours_vs_private_wall": round(ours / private, 3)}}


# By ratio: the bar, and whether it is met from above or from below.
SINGLE_BARS: dict[str, tuple[str, float, Callable[[float, float], bool]]] = {
    "null": ("rows_per_s", 5_000, lambda value, bar: value >= bar),
    "null_memory": ("memory_growth", 1.10, lambda value, bar: value <= bar),
    "many": ("ours_vs_empty_job", 1.5, lambda value, bar: value <= bar),
    "dag": ("ours_vs_private_wall", 0.45, lambda value, bar: value <= bar),
    "concurrency": ("widest_vs_best", 0.95, lambda value, bar: value >= bar),
}


def verdicts(results: Mapping[str, Result]) -> list[tuple[str, str, float, str, bool]]:
    """Return (workload, ratio, value, bar, met) of everything that has a bar."""
    lines = []
    for name, workload in WORKLOADS.items():
        for ratio, bar in workload.bars.items():
            value = results.get(name, {}).get("ratios", {}).get(ratio)
            if value is not None:
                lines.append((name, ratio, value, f">= {bar}", value >= bar))
    for key, (ratio, bar, met) in SINGLE_BARS.items():
        name = key.partition("_")[0]
        value = results.get(name, {}).get("ratios", {}).get(ratio)
        if value is not None:
            lines.append((name, ratio, value, f"{'>=' if met(bar + 1, bar) else '<='} {bar}", met(value, bar)))
    return lines


SINGLES: dict[str, Callable[[Bench, bool], Result]] = {"many": many, "concurrency": concurrency}
IN_QUICK = ("short", "many", "null")
LOADING_AN_ENGINE = frozenset({"http", "private"})


def run(wanted: Collection[str], quick: bool, repeats: int) -> dict[str, Result]:
    """Run what was asked for and return the results by workload."""
    results: dict[str, Result] = {}
    with ray_cluster() as cluster:
        for size, shape in MODELS.items():
            model = make_tiny_model(cluster.folder / size, context_length=CONTEXT_LENGTH, **shape)
            bench = Bench(cluster, model, ENGINE_KWARGS)
            workloads = {n: w for n, w in WORKLOADS.items() if w.model == size and n in wanted}
            singles = [name for name in SINGLES if name in wanted and size == "tiny"]
            if "dag" in wanted and size == "tiny":
                results["dag"] = dag(bench)
            if workloads or singles:
                bench.engine = bench.deploy("shared")
                left_out = LOADING_AN_ENGINE if quick else frozenset()
                results |= _compare(bench, {n: _without(w, left_out) for n, w in workloads.items()}, repeats)
                results |= {name: SINGLES[name](bench, quick) for name in singles}
                bench.teardown(bench.engine)
        if "null" in wanted:
            results["null"] = null(Bench(cluster, Path(), {}), NULL_ROWS[:1] if quick else NULL_ROWS)
    return results


def _compare(bench: Bench, workloads: Mapping[str, Workload], repeats: int) -> dict[str, Result]:
    asked = {contender for workload in workloads.values() for contender in workload.contenders}
    with ExitStack() as others:
        if "offline" in asked:
            others.enter_context(bench.offline_engine())
        if "http" in asked:
            others.enter_context(bench.http_endpoint())
        return {name: side_by_side(bench, workload, name, repeats) for name, workload in workloads.items()}


def _without(workload: Workload, left_out: Collection[str]) -> Workload:
    return replace(workload, contenders=tuple(c for c in workload.contenders if c not in left_out))


def show(results: Mapping[str, Result]) -> None:
    """Print every ratio, and its bar where it has one."""
    bars = {(name, ratio): (bar, met) for name, ratio, _, bar, met in verdicts(results)}
    print(f"\n{'workload':<13}{'ratio':<22}{'value':>10}  bar")
    for name, result in results.items():
        for ratio, value in result["ratios"].items():
            bar, met = bars.get((name, ratio), ("", True))
            print(f"{name:<13}{ratio:<22}{value:>10}  {bar}{'' if met else '  MISSED'}")


def main() -> None:
    """Run, write, draw, show."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    every = (*WORKLOADS, *SINGLES, "dag", "null")
    parser.add_argument("--quick", action="store_true", help="less than ten minutes: a part, once, on the one engine")
    parser.add_argument("--only", nargs="+", choices=every, help="workloads to run")
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}, with --quick 1")
    arguments = parser.parse_args()
    quick = arguments.quick
    OUT.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    repeats = arguments.repeats or (1 if quick else REPEATS)
    results = run(arguments.only or (IN_QUICK if quick else every), quick, repeats)
    (OUT / "bench.json").write_text(json.dumps({"workloads": results}, indent=1))
    drawn = plots.draw(results, OUT)
    show(results)
    print(f"\nbench: took {time.monotonic() - started:.0f} s; {OUT / 'bench.json'} and {len(drawn)} plots")


if __name__ == "__main__":
    main()
