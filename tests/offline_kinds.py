"""What vLLM alone makes of texts, with encoders and adapters. Runs as a process of its own.

Reads {"embed", "score", "texts", "query", "model", "adapters", "prompts", "max_tokens", "vision", "images"} from the
file named first; writes vectors, probabilities, scores, the answers of each adapter to the prompts, and what is said
to a text with one of so many images, to the second. Of the reranker also what the replica's own classes make of the
same engine, for which no other has to start.
"""

import asyncio
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from tests.offline import ENGINE_KWARGS, IN_PROCESS, stay_in_process, texts
from tests.tiny_vision import inline, make_image

# What becomes of longer texts.
CUT = {"truncate_prompt_tokens": 20, "truncation_side": "left"}
ENCODER_KWARGS = {name: ENGINE_KWARGS[name] for name in ("dtype", "enforce_eager")}


def main(request: Path, answers: Path) -> None:
    stay_in_process()
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.lora.request import LoRARequest

    from airflow_provider_raylm.cluster.replica.questions.pooling import Classify, Score

    task = json.loads(request.read_text())
    found = {}
    llm = LLM(model=task["embed"], runner="pooling", **ENCODER_KWARGS, **IN_PROCESS)
    found["embed"] = [one.outputs.embedding for one in llm.embed(task["texts"], use_tqdm=False)]
    found["cosine"] = [one.outputs.score for one in llm.score(task["query"], task["texts"], use_tqdm=False)]
    found["longer"] = [len(llm.get_tokenizer().encode(one)) > CUT["truncate_prompt_tokens"] for one in task["texts"]]
    raw = PoolingParams(use_activation=False)
    found["raw"] = [one.outputs.embedding for one in llm.embed(task["texts"], pooling_params=raw, use_tqdm=False)]
    cut = llm.embed(task["texts"], use_tqdm=False, tokenization_kwargs=CUT)
    found["cut"] = [one.outputs.embedding for one in cut]
    del llm
    llm = LLM(model=task["score"], runner="pooling", **ENCODER_KWARGS, **IN_PROCESS)
    found["classify"] = [one.outputs.probs for one in llm.classify(task["texts"], use_tqdm=False)]
    found["score"] = [one.outputs.score for one in llm.score(task["query"], task["texts"], use_tqdm=False)]
    pairs = [json.dumps([task["query"], text]) for text in task["texts"]]
    found["own_score"] = asyncio.run(_by_our_classes(llm, Score, pairs))
    found["own_classify"] = asyncio.run(_by_our_classes(llm, Classify, task["texts"]))
    del llm
    llm = LLM(model=task["model"], enable_lora=True, max_loras=2, max_lora_rank=8, **ENGINE_KWARGS, **IN_PROCESS)
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"])
    found["adapters"] = {
        name: texts(llm.generate(task["prompts"], sampling, use_tqdm=False, lora_request=LoRARequest(name, i, path)))
        for i, (name, path) in enumerate(task["adapters"].items(), 1)
    }
    del llm
    llm = LLM(model=task["vision"], **ENGINE_KWARGS, **IN_PROCESS)
    found["seen"] = texts(llm.chat(_with_images(task["texts"], task["images"]), sampling, use_tqdm=False))
    answers.write_text(json.dumps(found))


def _with_images(said, images):
    addresses = [inline(make_image(seed)) for seed in range(images)]
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": text},
                    {"type": "image_url", "image_url": {"url": addresses[i % images]}},
                ],
            }
        ]
        for i, text in enumerate(said)
    ]


class _Client:
    """An AsyncLLM's face on the engine that an LLM has in this process, for one request at a time."""

    def __init__(self, llm):
        self._engine = llm.llm_engine
        self.vllm_config = llm.llm_engine.vllm_config
        self.output_processor = llm.llm_engine.output_processor
        self.renderer = llm.renderer
        self.tokenizer = llm.get_tokenizer()

    async def encode(self, prompt, params, request_id):
        self._engine.add_request(request_id, prompt, params)
        outputs = []
        while not outputs:
            outputs = self._engine.step()
        yield outputs[0]


async def _by_our_classes(llm, kind, contents):
    """Return the values of the answers that a kind of question gets from the engine."""
    from airflow_provider_raylm.cluster.batch.exchange import Request
    from airflow_provider_raylm.cluster.replica.questions.vllm import Vllm

    engine = SimpleNamespace(_engine_client=_Client(llm), _oai_models=SimpleNamespace(lora_requests={}))
    vllm = Vllm(engine, ping=None, tasks=llm.supported_tasks)
    rows = await kind(vllm, {}, []).rows([Request(content) for content in contents], None)
    return [(await row(nullcontext)).value for row in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
