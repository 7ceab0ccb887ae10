"""vLLM alone: one `LLM`, loaded once, that answers a file of prompts whenever a line on stdin names one.

A line is {"source", "max_tokens"}; the answer is one line {"seconds", "completion_tokens"}, behind a sentinel.
"""

import json
import sys
import time
from pathlib import Path

import pyarrow.dataset as ds

SENTINEL = "OFFLINE "


def main(model: str, engine_kwargs: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, **json.loads(engine_kwargs))
    print(SENTINEL + "{}", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        files = sorted(str(path) for path in Path(task["source"]).glob("*.parquet"))
        texts = ds.dataset(files).to_table()["text"].to_pylist()
        sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True)
        started = time.monotonic()
        outputs = llm.generate(texts, sampling, use_tqdm=False)
        seconds = time.monotonic() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(SENTINEL + json.dumps({"seconds": seconds, "completion_tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
