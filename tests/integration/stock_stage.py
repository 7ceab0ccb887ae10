"""A Ray job: Ray Data's own ServeDeploymentProcessorConfig against an engine of this provider."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import ray
from ray.data.llm import ServeDeploymentProcessorConfig, build_processor
from ray.serve.llm.openai_api_models import CompletionRequest


def main(deployment: str, application: str, model: str, source: str, output: str, max_tokens: str) -> None:
    config = ServeDeploymentProcessorConfig(
        deployment_name=deployment,
        app_name=application,
        dtype_mapping={"CompletionRequest": CompletionRequest},
        concurrency=1,
        batch_size=32,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "method": "completions",
            "dtype": "CompletionRequest",
            "request_kwargs": {
                "model": model,
                "prompt": f"Say: {row['text']}",
                "max_tokens": int(max_tokens),
                "temperature": 0,
            },
            "text": row["text"],
        },
        postprocess=lambda row: {"text": row["text"], "response": row["choices"][0]["text"]},
        # Its stage actor holds a whole CPU beside the engine: the rest has to do with what is left of two.
        preprocess_map_kwargs={"num_cpus": 0.1},
        postprocess_map_kwargs={"num_cpus": 0.1},
    )
    rows = processor(ray.data.from_items(pq.read_table(source).to_pylist())).take_all()
    lines = [json.dumps({"text": row["text"], "response": row["response"]}) for row in rows]
    (Path(output) / "stock.jsonl").write_text("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
