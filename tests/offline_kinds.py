"""What vLLM alone makes of texts, with encoders and adapters. Runs as a process of its own.

Reads {"embed", "score", "texts", "query", "model", "adapters", "prompts", "max_tokens", "vision", "images"} from the
file named first; writes vectors, probabilities, scores, the answers of each adapter to the prompts, and what is said
to a text with one of so many images, to the second; and what is thought and said in a chat, as vLLM's parser takes it
apart.
"""

import json
import sys
from pathlib import Path

from tests.offline import ENGINE_KWARGS, IN_PROCESS, stay_in_process, texts
from tests.tiny_vision import inline, make_image

# What becomes of longer texts.
CUT = {"truncate_prompt_tokens": 20, "truncation_side": "left"}
THINKING = ("<think>", "</think>")
THOUGHT_TOKENS = 24
ENDS_A_THOUGHT = 6.0
ENCODER_KWARGS = {name: ENGINE_KWARGS[name] for name in ("dtype", "enforce_eager")}


def main(request: Path, answers: Path) -> None:
    stay_in_process()
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.lora.request import LoRARequest

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
    del llm
    llm = LLM(model=task["model"], enable_lora=True, max_loras=2, max_lora_rank=8, **ENGINE_KWARGS, **IN_PROCESS)
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"])
    found["adapters"] = {
        name: texts(llm.generate(task["prompts"], sampling, use_tqdm=False, lora_request=LoRARequest(name, i, path)))
        for i, (name, path) in enumerate(task["adapters"].items(), 1)
    }
    found.update(_thoughts(llm, task["texts"]))
    del llm
    llm = LLM(model=task["vision"], **ENGINE_KWARGS, **IN_PROCESS)
    found["seen"] = texts(llm.chat(_with_images(task["texts"], task["images"]), sampling, use_tqdm=False))
    answers.write_text(json.dumps(found))


def _thoughts(llm, texts):
    """Return what is thought and said to each text, and what makes a model with random weights end its thoughts."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    tokenizer = llm.get_tokenizer()
    bias = {tokenizer.convert_tokens_to_ids(THINKING[1]): ENDS_A_THOUGHT}
    sampling = SamplingParams(temperature=0, max_tokens=THOUGHT_TOKENS, logit_bias=bias, skip_special_tokens=False)
    chats = [[{"role": "user", "content": text}] for text in texts]
    parser = ReasoningParserManager.get_reasoning_parser("qwen3")(tokenizer)
    found = []
    for chat, output in zip(chats, llm.chat(chats, sampling, use_tqdm=False), strict=True):
        (answer,) = output.outputs
        reasoning, content = parser.extract_reasoning(answer.text, ChatCompletionRequest(messages=chat))
        told = {"reasoning": reasoning, "said": content or "", "token_ids": list(answer.token_ids)}
        found.append({**told, "finish_reason": answer.finish_reason})
    return {"thoughts": found, "bias": bias}


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
