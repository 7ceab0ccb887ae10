"""vLLM alone: one `LLM`, loaded once, that answers a file of prompts whenever a line on stdin names one.

A line is {"source", "sampling", "chunk"}, the last being how many prompts are handed over at a time, or null for all;
the answer is one line {"seconds", "completion_tokens", "longest"}, behind a sentinel. The last are the tokens of the
longest answer but for one in a hundred.
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
        sampling = SamplingParams(**task["sampling"])
        chunk = task["chunk"] or len(texts)
        started = time.monotonic()
        outputs = []
        for first in range(0, len(texts), chunk):
            outputs += llm.generate(texts[first : first + chunk], sampling, use_tqdm=False)
        seconds = time.monotonic() - started
        lengths = sorted(len(output.outputs[0].token_ids) for output in outputs)
        said = {"seconds": seconds, "completion_tokens": sum(lengths), "longest": lengths[-len(lengths) // 100]}
        print(SENTINEL + json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
