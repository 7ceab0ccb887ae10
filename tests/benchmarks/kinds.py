"""What a row may be asked beside text of a length: typed answers, a budget of its own, a vector, an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Bench, Timing, as_json
from tests.benchmarks.scale import with_spread
from tests.benchmarks.workloads import Workload
from tests.tiny_encoders import make_adapter, make_encoder

TYPED_ROWS = 4_000
ROWS = 10_000
# Of as many tokens as make its values: no text of which a model with random weights finds no end.
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", "so so"]},
        "stars": {"enum": [1, 2, 3, 4, 5]},
        "sure": {"type": "boolean"},
    },
    "required": ["mood", "stars", "sure"],
    "additionalProperties": False,
}
ADAPTERS = ("legal", "friendly")

Result = dict[str, Any]


def typed(bench: Bench, repeats: int, _quick: bool) -> Result:
    """Answers of a schema, beside vLLM alone with the same constraint."""
    workload = Workload(TYPED_ROWS, 64, (), {}, schema=SCHEMA)
    with bench.offline_engine("offline"):
        return _pairs(
            bench, workload, "typed", repeats, "offline", lambda source: bench.offline("offline", workload, source)
        )


def per_row(bench: Bench, repeats: int, _quick: bool) -> Result:
    """Each row with its own ``max_tokens``, beside the same rows with one for all; every row's is the same."""
    own = Workload(ROWS, 16, (), {}, budgets=True)
    shared = Workload(ROWS, 16, (), {})
    return _pairs(bench, own, "perrow", repeats, "shared", lambda source: bench.ours(shared, source))


def embed(bench: Bench, repeats: int) -> Result:
    """Vectors, beside ``LLM.embed``."""
    bench.model = make_encoder(bench.cluster.folder / "encoder", None)
    # What is about a model that generates is none of an encoder's.
    bench.engine_kwargs = {k: v for k, v in bench.engine_kwargs.items() if k in ("dtype", "enforce_eager")}
    bench.offline_kwargs = {"runner": "pooling"}
    workload = Workload(ROWS, 0, (), {}, kind="embed")
    return _on_its_own(bench, workload, "embed", repeats, bench.deploy("embed", task="embed"), bench.offline_engine)


def lora(bench: Bench, repeats: int) -> Result:
    """Two adapters, of which rows take turns, beside vLLM alone with the same."""
    folder = bench.cluster.folder / "adapters"
    adapters = {name: str(make_adapter(folder / name, bench.model, seed)) for seed, name in enumerate(ADAPTERS)}
    bench.offline_kwargs = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 8}
    workload = Workload(ROWS, 16, (), {}, adapters=adapters)
    return _on_its_own(bench, workload, "lora", repeats, bench.deploy("lora", adapters=adapters), bench.offline_engine)


def _on_its_own(
    bench: Bench,
    workload: Workload,
    name: str,
    repeats: int,
    engine: dict[str, Any],
    offline_engine: Callable[[str], AbstractContextManager[None]],
) -> Result:
    bench.engine = engine
    with offline_engine("offline"):
        found = _pairs(
            bench, workload, name, repeats, "offline", lambda source: bench.offline("offline", workload, source)
        )
    bench.teardown(engine)
    return found


def _pairs(
    bench: Bench, workload: Workload, name: str, repeats: int, other: str, run: Callable[[Path], Timing]
) -> Result:
    """Run ours and another in turn; return the ratios of their rows/s, which all have the same rows."""
    timings: dict[str, list[Timing]] = {other: [], "ours": []}
    for repeat in range(repeats):
        for contender, timed in ((other, run), ("ours", lambda source: bench.ours(workload, source))):
            source = workload.write(
                bench.cluster.folder / "in" / f"{name}-{contender}-{repeat}", f"{contender[:3]}{repeat}"
            )
            timings[contender].append(timed(source))
            shutil.rmtree(source)
            print(f"bench: {name} {contender} {as_json(timings[contender][-1])}", flush=True)
    pairs = [a.rows_per_s / b.rows_per_s for a, b in zip(timings["ours"], timings[other], strict=True)]
    contenders = {one: {"rows_per_s_all": [round(t.rows_per_s, 1) for t in taken]} for one, taken in timings.items()}
    return {"contenders": contenders, "ratios": with_spread(f"ours_vs_{other}", pairs)}
