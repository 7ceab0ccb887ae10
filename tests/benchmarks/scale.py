"""What one task on one replica does not show: several of either, long rows, and a crash."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from tests.benchmarks.harness import SAME_ENGINE, Bench, Timing, as_json
from tests.benchmarks.workloads import SKEWED, Workload
from tests.scripted_replicas import RESTART_S, WAVE_S, blocks, crash, on_replicas
from tests.tiny_model import make_tiny_model

CAPACITY = 16
LARGE_ROWS = 16_000
SMALL_ROWS = 1_500
FIXED_WAVES = 40
PREFIXES_ROWS = 6_400
# Thirteen million parameters. Reading an instruction is nearly all of a row's work for a model of a useful size, and a
# tenth for the tiny one.
PREFIXES_MODEL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
PREFIXES = 400
# In vLLM's blocks of 128 tokens: 400 instructions of 400 tokens do not fit into that, half of them do, beside what is
# worked on.
SMALL_CACHE = {"num_gpu_blocks_override": 960, "max_num_seqs": 32}
BLOCKS = 40
WIDE_CHARACTERS = 200_000
WIDE_ROWS = (1_000, 4_000)

Result = dict[str, Any]


def warm(bench: Bench, workload: Workload, contenders: Collection[str] = ("ours",)) -> None:
    """Have each engine sample an answer: with the first one vLLM's build for CPUs compiles its sampler, for seconds."""
    few = replace(workload, rows=64)
    source = few.write(bench.cluster.folder / "in" / "warm", "warm")
    for contender in {SAME_ENGINE.get(one, one) for one in contenders if one == "ours" or one.startswith("offline")}:
        bench.run(contender, few, source)
    shutil.rmtree(source)


def two_tasks(bench: Bench, repeats: int, _quick: bool) -> Result:
    """Two tasks side by side that have half of the rows each, and one that has all."""
    whole, half = SKEWED, replace(SKEWED, rows=SKEWED.rows // 2)
    timings: dict[str, list[Timing]] = {"one": [], "two": []}
    warm(bench, whole)
    for repeat in range(repeats):
        folder = bench.cluster.folder / "in" / f"tasks-{repeat}"
        timings["one"].append(bench.ours(whole, whole.write(folder / "one", f"one{repeat}")))
        parts = [half.write(folder / str(part), f"two{repeat}{part}") for part in range(2)]
        timings["two"].append(bench.ours(half, *parts))
        shutil.rmtree(folder)
        print(f"bench: two_tasks {[as_json(taken[-1]) for taken in timings.values()]}", flush=True)
    return _compared(timings, "two", "one")


def unequal(bench: Bench, repeats: int, _quick: bool) -> Result:
    """A small task beside a large one, and without: half of the engine should be its own, whatever the other has."""
    large = Workload(LARGE_ROWS, 32, ("ours",), {})
    small = Workload(SMALL_ROWS, 32, ("ours",), {}, batch={"block_rows": 64})
    timings: dict[str, list[Timing]] = {"beside": [], "alone": []}
    for repeat in range(repeats):
        folder = bench.cluster.folder / "in" / f"unequal-{repeat}"
        timings["alone"].append(bench.ours(small, small.write(folder / "alone", f"alone{repeat}")))
        with ThreadPoolExecutor(1) as pool, bench.first_request() as began:
            whole = pool.submit(bench.ours, large, large.write(folder / "large", f"large{repeat}"))
            while not (began or whole.done()):
                time.sleep(0.5)
            timings["beside"].append(bench.ours(small, small.write(folder / "small", f"small{repeat}")))
            over = whole.done()
            whole.result()
        if over:
            raise RuntimeError("the large task was done before the small one")
        shutil.rmtree(folder)
        print(f"bench: unequal {[as_json(taken[-1]) for taken in timings.values()]}", flush=True)
    return _compared(timings, "beside", "alone")


def replicas(bench: Bench, counts: Sequence[int] = (1, 2, 4, 8), waves: int = FIXED_WAVES) -> Result:
    """Engines that answer a row in a second, 16 rows at a time per replica: a task's rate, and the share of all."""
    contenders, ratios = {}, {}
    for count in counts:
        bench.began = bench.cluster.folder / f"began-{count}"
        bench.engine = bench.deploy_script("fixed_engine.py", count, bench.began, replicas=count)
        linear = CAPACITY * count
        workload = Workload(waves * linear, 1, ("ours",), {}, from_first_request=True, batch={"block_rows": CAPACITY})
        source = workload.write(bench.cluster.folder / "in" / f"replicas-{count}", "fixed")
        timing = bench.ours(workload, source)
        shutil.rmtree(source)
        bench.teardown(bench.engine)
        contenders[f"ours_{count}"] = as_json(timing)
        ratios[f"of_linear_{count}"] = round(timing.rows_per_s / linear, 3)
        print(f"bench: replicas {count}: {timing.rows_per_s:.1f} rows/s of {linear}", flush=True)
    bench.began = None
    return {"contenders": contenders, "ratios": {**ratios, "of_linear": min(ratios.values())}}


def prefixes(bench: Bench, repeats: int) -> Result:
    """Instructions that do not fit into a replica's cache, on two replicas: each at its own, or anywhere."""
    bench.model = make_tiny_model(bench.cluster.folder / "prefixes-model", context_length=1024, **PREFIXES_MODEL)
    bench.engine = bench.deploy("two", replicas=2, engine_kwargs={**bench.engine_kwargs, **SMALL_CACHE})
    # A label each.
    workload = Workload(PREFIXES_ROWS, 1, ("ours",), {}, prefixes=PREFIXES)
    ways = {
        "ours": bench.cluster,
        "anywhere": replace(bench.cluster, python="python -m tests.benchmarks.without_affinity"),
    }
    timings: dict[str, list[Timing]] = {way: [] for way in ways}
    warm(bench, workload)
    for repeat in range(repeats):
        for way, cluster in ways.items():
            source = workload.write(cluster.folder / "in" / f"prefixes-{way}-{repeat}", f"{way[:3]}{repeat}")
            bench.cluster = cluster
            timings[way].append(bench.ours(workload, source))
            shutil.rmtree(source)
            print(f"bench: prefixes {way} {as_json(timings[way][-1])}", flush=True)
    bench.cluster = ways["ours"]
    bench.teardown(bench.engine)
    return _compared(timings, "ours", "anywhere")


def wide(bench: Bench, sizes: Sequence[int] = WIDE_ROWS) -> Result:
    """Rows of 200 kB on an engine that answers at once: MB/s, and memory at two sizes."""
    bench.engine = bench.deploy_script("null_engine.py")
    contenders = {}
    for rows in sizes:
        workload = Workload(rows, 1, ("ours",), {}, characters=WIDE_CHARACTERS)
        source = workload.write(bench.cluster.folder / "in" / f"wide-{rows}", "wide")
        contenders[f"ours_{rows}"] = as_json(bench.ours(workload, source))
        shutil.rmtree(source)
        print(f"bench: wide {rows} {contenders[f'ours_{rows}']}", flush=True)
    bench.teardown(bench.engine)
    least, most = (contenders[f"ours_{rows}"] for rows in (sizes[0], sizes[-1]))
    ratios = {
        "mb_per_s": round(most["rows_per_s"] * WIDE_CHARACTERS / 1e6, 1),
        "memory_growth": round(most["peak_rss_mb"] / least["peak_rss_mb"], 3),
    }
    return {"contenders": contenders, "ratios": ratios}


def crashed() -> Result:
    """One crash among forty blocks of two minutes each, by a clock, without Ray and vLLM."""
    _, without, _ = on_replicas(lambda engine: engine.task("t", blocks(BLOCKS)))
    _, seconds, _ = on_replicas(lambda engine: crash(engine, BLOCKS, BLOCKS / 4 + 0.5, 0))
    print(f"bench: crash {without:.0f} s without, {seconds:.0f} s with it; a start takes {RESTART_S:.0f} s", flush=True)
    contenders = {"without": {"total_s": without}, "ours": {"total_s": seconds, "wave_s": WAVE_S}}
    return {"contenders": contenders, "ratios": {"with_vs_without": round(seconds / without, 3)}}


def _compared(timings: Mapping[str, Sequence[Timing]], one: str, other: str) -> Result:
    """Return the ratio of two that ran in pairs, by tokens: the median, and beside it least and most."""
    pairs = [a.tokens_per_s / b.tokens_per_s for a, b in zip(timings[one], timings[other], strict=True)]
    return {
        "contenders": {name: as_json(of[-1]) for name, of in timings.items()},
        "ratios": with_spread(f"{one}_vs_{other}", pairs),
    }


def with_spread(name: str, values: Collection[float]) -> Result:
    """Return the median of some values, and beside it the least and the most."""
    spread = [round(min(values), 3), round(max(values), 3)]
    return {name: round(statistics.median(values), 3), f"{name}_spread": spread}
