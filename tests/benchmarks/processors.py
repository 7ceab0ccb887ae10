"""A Ray job: one of Ray Data's own LLM processors, or Ray's own harness, over a folder of prompts, with its times.

Reads the task as JSON from the file named first and writes {"first_at", "last_at", "first_rows", "rows",
"completion_tokens"} to the file named second; times are Unix seconds. Nothing is written out for the rows themselves.
"""

import json
import sys
import time
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.dataset as ds
import ray
from ray.data import DataContext
from ray.data.llm import (
    HttpRequestProcessorConfig,
    ServeDeploymentProcessorConfig,
    build_processor,
    vLLMEngineProcessorConfig,
)

# Beside engines on two cores no stage can have a whole CPU.
FRACTION = {"num_cpus": 0.05}


def _stock(task: dict[str, Any]) -> Any:
    from ray.serve.llm.openai_api_models import CompletionRequest

    config = ServeDeploymentProcessorConfig(
        deployment_name=task["deployment"],
        app_name=task["application"],
        dtype_mapping={"CompletionRequest": CompletionRequest},
        concurrency=1,
    )
    request = {"model": task["model"], **task["sampling"]}
    return build_processor(
        config,
        preprocess=lambda row: {
            "method": "completions",
            "dtype": "CompletionRequest",
            "request_kwargs": {**request, "prompt": row["text"]},
        },
        postprocess=lambda row: {"tokens": row["usage"]["completion_tokens"]},
        preprocess_map_kwargs=FRACTION,
        postprocess_map_kwargs=FRACTION,
    )


def _http(task: dict[str, Any]) -> Any:
    request = {"model": task["model"], **task["sampling"]}
    return build_processor(
        HttpRequestProcessorConfig(url=f"{task['endpoint']}/v1/completions", concurrency=1),
        preprocess=lambda row: {"payload": {**request, "prompt": row["text"]}},
        postprocess=lambda row: {"tokens": row["http_response"]["usage"]["completion_tokens"]},
        preprocess_map_kwargs=FRACTION,
        postprocess_map_kwargs=FRACTION,
    )


def _private(task: dict[str, Any]) -> Any:
    """An engine for every turn of the conversation, all loaded at a time: rows stream from one to the next."""
    turns = [_private_turn(task) for _ in range(task["turns"])]
    return lambda rows: reduce(lambda answered, turn: turn(answered), turns, rows)


def _private_turn(task: dict[str, Any]) -> Any:
    config = vLLMEngineProcessorConfig(
        model_source=task["model_source"],
        engine_kwargs={**task["engine_kwargs"], "distributed_executor_backend": "mp"},
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage={"enabled": True, **FRACTION},
        detokenize_stage={"enabled": True, **FRACTION},
        placement_group_config={"bundles": [task["bundle"]]},
        runtime_env={"env_vars": task["environ"]},
    )
    return build_processor(
        config,
        preprocess=lambda row: {
            "prompt": row["text"],
            "sampling_params": task["sampling"],
            "tokens": row.get("tokens", 0),
        },
        postprocess=lambda row: {
            "text": row["prompt"] + row["generated_text"],
            "tokens": row["tokens"] + row["num_generated_tokens"],
        },
        preprocess_map_kwargs=FRACTION,
        postprocess_map_kwargs=FRACTION,
    )


def _by_harness(task: dict[str, Any], rows: ray.data.Dataset) -> dict[str, Any]:
    """Let Ray's own benchmark run its mode for Serve deployments, on the shared engine instead of one of its own."""
    # Its module imports a library that it needs for conversations from a hub; these prompts are others.
    sys.modules["datasets"] = SimpleNamespace(load_dataset=None, load_from_disk=None)  # type: ignore[assignment]
    from ray.llm._internal.batch.benchmark import benchmark_processor as harness

    answered: list[ray.data.Dataset] = []

    def keeping(**kwargs: Any) -> Any:
        process = harness.build_single_serve_deployment_processor(**kwargs)

        def materialize(dataset: ray.data.Dataset) -> None:
            answered.append(process(dataset).materialize())

        return lambda dataset: SimpleNamespace(materialize=lambda: materialize(dataset))

    result = harness.run_processor(
        harness.Mode.SERVE_DEPLOYMENT,
        rows.rename_columns({"text": "prompt"}).materialize(),
        keeping,
        batch_size=64,
        concurrency=1,
        model=task["model"],
        sampling_params=task["sampling"],
        deployment_name=task["deployment"],
        app_name=task["application"],
    )
    tokens = sum(row["usage"]["completion_tokens"] for row in answered[0].iter_rows())
    now = time.time()
    # It takes the whole's time only, from before its stages start.
    return {
        "first_at": now - result.elapsed_s,
        "last_at": now,
        "first_rows": 0,
        "rows": result.samples,
        "completion_tokens": tokens,
    }


PROCESSORS = {"stock": _stock, "http": _http, "private": _private}


def main(request: Path, result: Path) -> None:
    task = json.loads(request.read_text())
    context = DataContext.get_current()
    context.enable_progress_bars = False
    files = sorted(str(path) for path in Path(task["source"]).glob("*.parquet"))
    # Rows from memory: reading by Ray Data costs another half minute, and a repartition wants a CPU that is not there.
    texts = ds.dataset(files).to_table(columns=["text"]).to_pylist()
    rows = ray.data.from_items(texts, override_num_blocks=task["blocks"])
    if task["contender"] == "harness":
        result.write_text(json.dumps(_by_harness(task, rows)))
        return
    counted, tokens, first_at, first_rows = 0, 0, 0.0, 0
    for batch in PROCESSORS[task["contender"]](task)(rows).iter_batches(batch_size=None, batch_format="pyarrow"):
        counted += batch.num_rows
        tokens += sum(batch["tokens"].to_pylist())
        if not first_at:
            first_at, first_rows = time.time(), counted
    outcome = {"first_at": first_at, "last_at": time.time(), "first_rows": first_rows, "rows": counted}
    result.write_text(json.dumps({**outcome, "completion_tokens": tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
