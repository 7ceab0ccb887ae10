"""What vLLM alone makes of texts, with encoders and adapters. Runs as a process of its own.

Reads {"embed", "score", "texts", "query", "model", "adapters", "prompts", "max_tokens"} from the file named
first; writes vectors, probabilities, scores, and the answers of each adapter to the prompts, to the second.
"""

import json
import sys
from pathlib import Path

from tests.offline import ENGINE_KWARGS, IN_PROCESS, stay_in_process, texts

ENCODER_KWARGS = {name: ENGINE_KWARGS[name] for name in ("dtype", "enforce_eager")}


def main(request: Path, answers: Path) -> None:
    stay_in_process()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    task = json.loads(request.read_text())
    found = {}
    llm = LLM(model=task["embed"], runner="pooling", **ENCODER_KWARGS, **IN_PROCESS)
    found["embed"] = [one.outputs.embedding for one in llm.embed(task["texts"], use_tqdm=False)]
    found["cosine"] = [one.outputs.score for one in llm.score(task["query"], task["texts"], use_tqdm=False)]
    del llm
    llm = LLM(model=task["score"], runner="pooling", **ENCODER_KWARGS, **IN_PROCESS)
    found["classify"] = [one.outputs.probs for one in llm.classify(task["texts"], use_tqdm=False)]
    found["score"] = [one.outputs.score for one in llm.score(task["query"], task["texts"], use_tqdm=False)]
    del llm
    llm = LLM(model=task["model"], enable_lora=True, max_loras=2, max_lora_rank=8, **ENGINE_KWARGS, **IN_PROCESS)
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"])
    found["adapters"] = {
        name: texts(llm.generate(task["prompts"], sampling, use_tqdm=False, lora_request=LoRARequest(name, i, path)))
        for i, (name, path) in enumerate(task["adapters"].items(), 1)
    }
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
