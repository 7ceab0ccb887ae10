"""The ceiling and the truth: the same model, asked by vLLM alone. Runs as a process of its own.

Reads {"model", "prompts", "chats", "max_tokens"} from the file named first; writes {"prompts", "chats", "stops"} to the
second: the last with pairs of sampling parameters that end answers early, and the answers to the prompts then.
"""

import json
import sys
from collections import Counter
from pathlib import Path

ENGINE_KWARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}


def main(request: Path, answers: Path) -> None:
    from vllm import LLM, SamplingParams

    task = json.loads(request.read_text())
    llm = LLM(model=task["model"], **ENGINE_KWARGS)
    greedy = {"temperature": 0, "max_tokens": task["max_tokens"]}
    sampling = SamplingParams(**greedy)
    completions = llm.generate(task["prompts"], sampling, use_tqdm=False)
    chats = llm.chat(task["chats"], sampling, use_tqdm=False)
    tokens = Counter(token for output in completions for token in output.outputs[0].token_ids)
    (token, _), *_ = tokens.most_common(1)
    stops = []
    for stop in (
        {"stop_token_ids": [token]},
        {"stop_token_ids": [token], "include_stop_str_in_output": True},
        {"stop": ["e", "t"]},
    ):
        outputs = llm.generate(task["prompts"], SamplingParams(**greedy, **stop), use_tqdm=False)
        stops.append([stop, texts(outputs)])
    answers.write_text(json.dumps({"prompts": texts(completions), "chats": texts(chats), "stops": stops}))


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
