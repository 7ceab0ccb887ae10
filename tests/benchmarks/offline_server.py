"""vLLM alone: one `LLM`, loaded once, that answers a file of prompts whenever a line on stdin names one.

A line is {"source", "sampling", "chunk", "kind", "schema", "adapters"}: how many prompts are handed over at a time, or
null for all; whether text or a vector is asked for; what answers are held to; and the places of adapters by name, of
which the column ``adapter`` has each row's;
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
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(model=model, **json.loads(engine_kwargs))
    print(SENTINEL + "{}", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        files = sorted(str(path) for path in Path(task["source"]).glob("*.parquet"))
        table = ds.dataset(files).to_table()
        texts = table["text"].to_pylist()
        if task["kind"] == "embed":
            started = time.monotonic()
            llm.embed(texts, use_tqdm=False)
            said = {"seconds": time.monotonic() - started, "completion_tokens": 0, "longest": 0}
            print(SENTINEL + json.dumps(said), flush=True)
            continue
        held = {"structured_outputs": StructuredOutputsParams(json=task["schema"])} if task["schema"] else {}
        sampling = SamplingParams(**task["sampling"], **held)
        adapters = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(task["adapters"].items(), 1)}
        chosen = [adapters[name] for name in table["adapter"].to_pylist()] if adapters else None
        chunk = task["chunk"] or len(texts)
        started = time.monotonic()
        outputs = []
        for first in range(0, len(texts), chunk):
            now = slice(first, first + chunk)
            outputs += llm.generate(texts[now], sampling, use_tqdm=False, lora_request=chosen and chosen[now])
        seconds = time.monotonic() - started
        lengths = sorted(len(output.outputs[0].token_ids) for output in outputs)
        said = {"seconds": seconds, "completion_tokens": sum(lengths), "longest": lengths[-len(lengths) // 100]}
        print(SENTINEL + json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
