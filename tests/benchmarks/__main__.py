"""Throughput side by side: this provider, Ray Data's own ways to the engine, and vLLM alone.

Writes build/bench/bench.json and plots beside it, and prints a table of the ratios with their bars.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks import plots
from tests.benchmarks.deferred import deferred
from tests.benchmarks.harness import HERE, REPOSITORY, SAME_ENGINE, Bench, Timing, as_json
from tests.benchmarks.kinds import embed, lora, per_row, typed
from tests.benchmarks.planning import planning, resume
from tests.benchmarks.scale import crashed, prefixes, replicas, two_tasks, unequal, warm, wide, with_spread
from tests.benchmarks.workloads import WORKLOADS, Workload
from tests.clusters import ray_cluster
from tests.tiny_model import make_tiny_model

OUT = REPOSITORY / "build" / "bench"
REPEATS = 3
CONTEXT_LENGTH = 1024


@dataclass(frozen=True)
class Model:
    """A model of a size, and vLLM's arguments that belong to it.

    Attributes:
        shape: how it differs from the tiny one.
        engine_kwargs: beside those that all models on a machine have.
    """

    shape: Mapping[str, Any] = field(default_factory=dict)
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What the engines are on a kind of machine.

    Attributes:
        models: by size.
        engine_kwargs: vLLM's arguments, the same for every contender.
        gpus: GPUs of the shared engine.
        cpus: CPUs of the shared engine.
        rows_factor: how many times the rows of a workload make a run of seconds.
        left_out: contenders and workloads that do not fit.
        bars: by workload, bars that differ.
    """

    models: Mapping[str, Model]
    engine_kwargs: Mapping[str, Any]
    gpus: int
    cpus: float
    rows_factor: int = 1
    left_out: frozenset[str] = frozenset()
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


CPU = Machine(
    models={
        "tiny": Model(),
        "small": Model(
            # 18 million parameters with the vocabulary of 1,000.
            {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 14},
            # A request takes long here. With vLLM's own 256 at a time, four waves would be the whole run and no
            # steady state.
            {"max_num_seqs": 64},
        ),
    },
    engine_kwargs={
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": CONTEXT_LENGTH,
        # A model with random weights would write white space between JSON's parts for ever.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    },
    gpus=0,
    cpus=0.5,
)
# Weights that vLLM makes up: only shapes count for speed.
_ON_GPU = {"weights": False, "vocabulary": 32_000}
GPU = Machine(
    models={
        # The layers of Qwen2.5-1.5B: 1.4 billion parameters with this vocabulary.
        "tiny": Model(
            {
                **_ON_GPU,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
            }
        ),
        # The layers of Qwen2.5-7B: 6.6 billion parameters with this vocabulary.
        "small": Model(
            {
                **_ON_GPU,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            {"max_num_seqs": 256},
        ),
    },
    engine_kwargs={
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_model_len": CONTEXT_LENGTH,
        # The shared engine, offline and http are loaded side by side; idle ones only take memory.
        "gpu_memory_utilization": 0.3,
    },
    gpus=1,
    cpus=1,
    rows_factor=4,
    # Ray gives the one GPU to the shared engine: there is none for private ones beside it, nor for a second replica.
    left_out=frozenset({"private", "turns", "prefixes"}),
    bars={"long": {"ours_vs_offline": 0.97}},
)

NULL_CHARACTERS = 2_000
NULL_ROWS = (100_000, 1_000_000)
# Of an unused column, in every row: an embedding.
FLOATS = 1536
TASKS = 20
QUICK_TASKS = 3
CONCURRENCY_ROWS = 10_000
ROWS_PER_TASK = 100
DAG_ROWS = 500
WINDOWS = (128, 256, 512, 1024, 2048, 4096)
TASKS_AT_A_TIME = (1, 2)
# From so many on, at the default poll interval, all triggers together look as often as they may.
DEFERRED = (30, 200)

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
            if workload.new_tokens not in (None, timing.completion_tokens):
                raise RuntimeError(
                    f"{contender} generated {timing.completion_tokens} tokens, not {workload.new_tokens}"
                )
            print(f"bench: {name} {contender} {as_json(timing)}", flush=True)
            timings[contender].append(timing)
    return {"contenders": {c: _median(t) for c, t in timings.items()}, "ratios": _ratios(timings, workload.turns)}


def _median(timings: list[Timing]) -> dict[str, Any]:
    values = [as_json(timing) for timing in timings]
    medians = {field: statistics.median(value[field] for value in values) for field in values[0]}
    return {**medians, "rows_per_s_all": [value["rows_per_s"] for value in values]}


def _ratios(timings: Mapping[str, list[Timing]], turns: int) -> Result:
    """Return ours against each other contender over the repeats: medians, and beside them least and most."""
    ratios: Result = {}
    for other in timings:
        if other == "harness":
            # Ray's own harness knows no rows that come out, only the whole.
            ratios |= with_spread(
                "ours_vs_harness_wall",
                [b.total_s / a.total_s for a, b in zip(timings["ours"], timings[other], strict=True)],
            )
        elif other != "ours":
            # By tokens: where answers are sampled, no two contenders generate as many.
            pairs = [a.tokens_per_s / b.tokens_per_s for a, b in zip(timings["ours"], timings[other], strict=True)]
            ratios |= with_spread(f"ours_vs_{other}", pairs)
            if other == "private" and turns > 1:
                ratios |= with_spread("ours_vs_private_per_engine", [pair * turns for pair in pairs])
    return ratios


def null(bench: Bench, sizes: tuple[int, ...]) -> Result:
    """The pipeline alone, on an engine that answers at once: rows/s, and memory at two sizes."""
    bench.engine = bench.deploy_script("null_engine.py")
    contenders = {}
    # The first task on a cluster starts Ray Data's own actors, which stay: they are not this one's memory.
    for rows in (1_000, *sizes):
        workload = Workload(rows, 1, ("ours",), {}, characters=NULL_CHARACTERS)
        source = workload.write(bench.cluster.folder / "in" / f"null-{rows}", "null")
        contenders[f"ours_{rows}"] = as_json(bench.ours(workload, source))
        shutil.rmtree(source)
        print(f"bench: null {rows} {contenders[f'ours_{rows}']}", flush=True)
    del contenders["ours_1000"]
    beside = Workload(sizes[0], 1, ("ours",), {}, floats=FLOATS)
    source = beside.write(bench.cluster.folder / "in" / "null-wide", "null")
    contenders["ours_wide"] = as_json(bench.ours(beside, source))
    bench.teardown(bench.engine)
    shutil.rmtree(source)
    print(f"bench: null beside {FLOATS} floats {contenders['ours_wide']}", flush=True)
    least, most = (contenders[f"ours_{rows}"] for rows in (sizes[0], sizes[-1]))
    ratios = {
        "rows_per_s": most["rows_per_s"],
        f"rows_per_s_beside_{FLOATS}_floats": contenders["ours_wide"]["rows_per_s"],
    }
    if len(sizes) > 1:
        ratios["memory_growth"] = round(most["peak_rss_mb"] / least["peak_rss_mb"], 3)
    return {"contenders": contenders, "ratios": ratios}


def many(bench: Bench, _repeats: int, quick: bool) -> Result:
    """What a small task costs on a warm engine, beside a Ray job that only reads and writes the same rows."""
    workload = Workload(ROWS_PER_TASK, 16, ("ours",), {})
    ours, empty = [], []
    for number in range(QUICK_TASKS if quick else TASKS):
        source = workload.write(bench.cluster.folder / "in" / f"many-{number}", f"many{number}")
        ours.append(bench.ours(workload, source, poll_interval=0.5).total_s)
        started = time.time()
        bench.cluster.run_script(HERE / "copy_rows.py", source, bench.cluster.folder / "copied" / str(number))
        empty.append(time.time() - started)
        print(f"bench: many {number}: ours {ours[-1]:.1f} s, empty job {empty[-1]:.1f} s", flush=True)
    contenders = {
        name: {"total_s": round(statistics.median(seconds), 3)}
        for name, seconds in (("ours", ours), ("empty_job", empty))
    }
    pairs = [a / b for a, b in zip(ours, empty, strict=True)]
    return {"contenders": contenders, "ratios": with_spread("ours_vs_empty_job", pairs)}


def concurrency(bench: Bench, repeats: int, quick: bool) -> Result:
    """Rows/s of one task against its window, and of several tasks at a time with the default one; in turn."""
    workload = Workload(CONCURRENCY_ROWS, 16, ("ours",), {})
    windows = WINDOWS[:: len(WINDOWS) - 1] if quick else WINDOWS
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        **{f"window_{rows}": (1, {"in_flight_rows": rows, "block_rows": 64}) for rows in windows},
        **{f"tasks_{tasks}": (tasks, {}) for tasks in TASKS_AT_A_TIME},
    }
    timings: dict[str, list[Timing]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, (tasks, batch) in cases.items():
            folder = bench.cluster.folder / "in" / f"{name}-{repeat}"
            sources = [workload.write(folder / str(task), f"{name}{repeat}{task}") for task in range(tasks)]
            timings[name].append(bench.ours(workload, *sources, **batch))
            shutil.rmtree(folder)
            print(f"bench: concurrency {name} {timings[name][-1].rows_per_s:.0f} rows/s", flush=True)
    contenders = {name: _median(of) for name, of in timings.items()}
    rates = {name: of["rows_per_s"] for name, of in contenders.items()}
    best = max(rates[f"window_{rows}"] for rows in windows)
    return {
        "contenders": contenders,
        "ratios": {
            "widest_vs_best": round(rates[f"window_{windows[-1]}"] / best, 3),
            "default_vs_best": round(rates["tasks_1"] / best, 3),
            "two_tasks_vs_one": round(rates["tasks_2"] / rates["tasks_1"], 3),
        },
    }


def dag(bench: Bench, _repeats: int) -> Result:
    """Three tasks and all that they need: side by side on one engine, or one after the other with an engine each.

    Private engines would run side by side, too, on three times the hardware.
    """
    workload = Workload(DAG_ROWS, 16, ("ours",), {})
    sources = [workload.write(bench.cluster.folder / "in" / f"dag-{n}", f"dag{n}") for n in range(3)]
    # Ray Data's own actors start with its first job and stay: they are nobody's cost.
    bench.cluster.run_script(HERE / "copy_rows.py", sources[0], bench.cluster.folder / "copied" / "dag")
    started = time.time()
    engine = bench.deploy("dag")
    deployed = time.time()
    jobs = []
    for number, source in enumerate(sources):
        batch = {
            "source": str(source),
            "output": str(bench.cluster.folder / f"dag{number}"),
            **workload.question,
        }
        jobs.append(bench.cluster.start("infer", {"engine": engine, "batch": batch}))
    for job in jobs:
        bench.cluster.finish(job)
    answered = time.time()
    bench.teardown(engine)
    ours = time.time() - started
    parts = {"deploy_s": deployed - started, "tasks_s": answered - deployed, "total_s": ours}
    print(f"bench: dag ours {parts}", flush=True)
    started = time.time()
    for source in sources:
        bench.processor("private", workload, source)
    private = time.time() - started
    print(f"bench: dag private {private:.0f} s", flush=True)
    contenders = {
        "ours": {name: round(seconds, 1) for name, seconds in parts.items()},
        "private": {"total_s": round(private, 1)},
    }
    return {"contenders": contenders, "ratios": {"ours_vs_private_wall": round(ours / private, 3)}}


# By ratio: the bar, and whether it is met from above or from below.
SINGLE_BARS: dict[str, tuple[str, float, Callable[[float, float], bool]]] = {
    "null": ("rows_per_s", 30_000, lambda value, bar: value >= bar),
    "null_memory": ("memory_growth", 1.10, lambda value, bar: value <= bar),
    "many": ("ours_vs_empty_job", 0.9, lambda value, bar: value <= bar),
    "dag": ("ours_vs_private_wall", 0.45, lambda value, bar: value <= bar),
    "concurrency": ("widest_vs_best", 0.95, lambda value, bar: value >= bar),
    "null_wide": ("rows_per_s_beside_1536_floats", 20_000, lambda value, bar: value >= bar),
    "planning": ("requests_per_file", 2, lambda value, bar: value <= bar),
    "planning_s": ("first_block_s", 40, lambda value, bar: value <= bar),
    "resume": ("resume_s", 60, lambda value, bar: value <= bar),
    "resume_memory": ("peak_rss_mb", 1024, lambda value, bar: value <= bar),
    "deferred": ("requests_per_s", 1.1, lambda value, bar: value <= bar),
    "two_tasks": ("two_vs_one", 0.97, lambda value, bar: value >= bar),
    # Two thirds of a half.
    "unequal": ("beside_vs_alone", 0.333, lambda value, bar: value >= bar),
    "replicas": ("of_linear", 0.95, lambda value, bar: value >= bar),
    "prefixes": ("ours_vs_anywhere", 1.3, lambda value, bar: value >= bar),
    "wide": ("mb_per_s", 200, lambda value, bar: value >= bar),
    "wide_memory": ("memory_growth", 1.10, lambda value, bar: value <= bar),
    "crash": ("with_vs_without", 1.25, lambda value, bar: value <= bar),
    "typed": ("ours_vs_offline", 0.95, lambda value, bar: value >= bar),
    "perrow": ("ours_vs_shared", 0.97, lambda value, bar: value >= bar),
    "embed": ("ours_vs_offline", 0.95, lambda value, bar: value >= bar),
    "lora": ("ours_vs_offline", 0.95, lambda value, bar: value >= bar),
    "deferred_cpu": ("triggerer_cpu_percent", 1.1, lambda value, bar: value <= bar),
}


def verdicts(results: Mapping[str, Result], machine: Machine) -> dict[tuple[str, str], tuple[str, bool]]:
    """Return by (workload, ratio) the bar and whether it is met, of everything that has a bar."""
    found = {}
    for name, workload in WORKLOADS.items():
        for ratio, bar in {**workload.bars, **machine.bars.get(name, {})}.items():
            value = results.get(name, {}).get("ratios", {}).get(ratio)
            if value is not None:
                found[name, ratio] = (f">= {bar}", value >= bar)
    for key, (ratio, bar, met) in SINGLE_BARS.items():
        name = key.partition("_")[0]
        value = results.get(name, {}).get("ratios", {}).get(ratio)
        if value is not None:
            found[name, ratio] = (f"{'>=' if met(bar + 1, bar) else '<='} {bar}", met(value, bar))
    return found


# Beside the workloads: on the shared engine; on engines of their own; without vLLM; and without a cluster.
ON_SHARED: dict[str, Callable[[Bench, int, bool], Result]] = {
    "many": many,
    "concurrency": concurrency,
    "two_tasks": two_tasks,
    "unequal": unequal,
    "typed": typed,
    "perrow": per_row,
}
ON_OWN: dict[str, Callable[[Bench, int], Result]] = {
    "dag": dag,
    "prefixes": prefixes,
    "embed": embed,
    "lora": lora,
}
WITHOUT_VLLM: dict[str, Callable[[Bench, bool], Result]] = {
    "null": lambda bench, quick: null(bench, NULL_ROWS[:1] if quick else NULL_ROWS),
    "wide": lambda bench, _: wide(bench),
    "replicas": lambda bench, _: replicas(bench),
}
WITHOUT_RAY: dict[str, Callable[[], Result]] = {
    "planning": planning,
    "resume": resume,
    "crash": crashed,
    "deferred": lambda: deferred(DEFERRED),
}
EVERY = (*WORKLOADS, *ON_SHARED, *ON_OWN, *WITHOUT_VLLM, *WITHOUT_RAY)
IN_QUICK = ("short", "many", "null")
LOADING_AN_ENGINE = frozenset({"http", "private"})
# On paper: Ray's own harness asks for a whole CPU for each of its stages, all at a time.
CPUS = 4


def run(wanted: Collection[str], machine: Machine, quick: bool, repeats: int) -> Iterator[tuple[str, Result]]:
    """Run what was asked for and yield (workload, result) as they come."""
    left_out = machine.left_out | (LOADING_AN_ENGINE if quick else frozenset())
    with ray_cluster(cpus=CPUS) as cluster:
        for size, model in machine.models.items():
            workloads = {
                name: replace(
                    workload,
                    rows=workload.rows * machine.rows_factor,
                    contenders=tuple(c for c in workload.contenders if c not in left_out),
                )
                for name, workload in WORKLOADS.items()
                if workload.model == size and name in wanted and name not in left_out
            }
            on_shared = [name for name in ON_SHARED if name in wanted and size == "tiny"]
            on_own = [name for name in ON_OWN if name in wanted and name not in left_out and size == "tiny"]
            if not (workloads or on_shared or on_own):
                continue
            path = make_tiny_model(cluster.folder / size, context_length=CONTEXT_LENGTH, **model.shape)
            engine_kwargs = {**machine.engine_kwargs, **model.engine_kwargs}
            bench = Bench(cluster, path, engine_kwargs, machine.gpus, machine.cpus)
            if workloads or on_shared:
                bench.engine = bench.deploy("shared")
                yield from _compare(bench, workloads, repeats)
                for name in on_shared:
                    yield name, ON_SHARED[name](bench, repeats, quick)
                bench.teardown(bench.engine)
            for name in on_own:
                # After the others, when nothing else is loaded.
                yield name, ON_OWN[name](Bench(cluster, path, engine_kwargs, machine.gpus, machine.cpus), repeats)
        for name in WITHOUT_VLLM:
            if name in wanted:
                yield name, WITHOUT_VLLM[name](Bench(cluster, Path(), {}, 0, 0), quick)
    for name in WITHOUT_RAY:
        if name in wanted:
            yield name, WITHOUT_RAY[name]()


def _compare(bench: Bench, workloads: Mapping[str, Workload], repeats: int) -> Iterator[tuple[str, Result]]:
    asked = {contender for workload in workloads.values() for contender in workload.contenders}
    with ExitStack() as others:
        for contender in sorted({SAME_ENGINE.get(one, one) for one in asked if one.startswith("offline")}):
            others.enter_context(bench.offline_engine(contender))
        if "http" in asked:
            others.enter_context(bench.http_endpoint())
        for name, workload in workloads.items():
            if workload.skewed:
                warm(bench, workload, workload.contenders)
            yield name, side_by_side(bench, workload, name, repeats)


def show(results: Mapping[str, Result], machine: Machine) -> None:
    """Print every ratio, its spread over the repeats and its bar where it has one."""
    bars = verdicts(results, machine)
    print(f"\n{'workload':<13}{'ratio':<28}{'median':>10}  {'least to most':<18}bar")
    for name, result in results.items():
        ratios = result["ratios"]
        for ratio in (ratio for ratio in ratios if not ratio.endswith("_spread")):
            bar, met = bars.get((name, ratio), ("", True))
            spread = " to ".join(map(str, ratios.get(f"{ratio}_spread", ())))
            print(f"{name:<13}{ratio:<28}{ratios[ratio]:>10}  {spread:<18}{bar}{'' if met else '  MISSED'}")


def main() -> None:
    """Run, write, draw, show."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than ten minutes: a part, once, on the one engine")
    parser.add_argument("--gpu", action="store_true", help="on one NVIDIA GPU, with models of 1.4 and 6.6 B parameters")
    parser.add_argument(
        "--only", nargs="+", choices=EVERY, help="workloads to run; of others bench.json keeps what it has"
    )
    parser.add_argument("--repeats", type=int, help=f"default: {REPEATS}, with --quick 1")
    arguments = parser.parse_args()
    quick, machine = arguments.quick, GPU if arguments.gpu else CPU
    OUT.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    repeats = arguments.repeats or (1 if quick else REPEATS)
    written = OUT / "bench.json"
    kept = json.loads(written.read_text())["workloads"] if arguments.only and written.exists() else {}
    results = {}
    for name, result in run(arguments.only or (IN_QUICK if quick else EVERY), machine, quick, repeats):
        results[name] = result
        # After each: an hour's measuring should not be lost to its last minute.
        written.write_text(json.dumps({"workloads": kept | results}, indent=1))
    show(results, machine)
    drawn = plots.draw(kept | results, OUT)
    print(f"\nbench: took {time.monotonic() - started:.0f} s; {written} and {len(drawn)} plots")


if __name__ == "__main__":
    main()
