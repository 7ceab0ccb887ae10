"""A Ray job: one of Ray Data's own LLM processors over a folder of prompts, with the times of its rows.

Reads the task as JSON from the file named first and writes {"first_at", "last_at", "first_rows", "rows",
"completion_tokens"} to the file named second; times are Unix seconds. Nothing is written out for the rows themselves.
"""

import json
import sys
import time
from functools import reduce
from pathlib import Path
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


PROCESSORS = {"stock": _stock, "http": _http, "private": _private}


def main(request: Path, result: Path) -> None:
    task = json.loads(request.read_text())
    context = DataContext.get_current()
    context.enable_progress_bars = False
    files = sorted(str(path) for path in Path(task["source"]).glob("*.parquet"))
    # Rows from memory: reading by Ray Data costs another half minute, and a repartition wants a CPU that is not there.
    texts = ds.dataset(files).to_table(columns=["text"]).to_pylist()
    rows = ray.data.from_items(texts, override_num_blocks=task["blocks"])
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
