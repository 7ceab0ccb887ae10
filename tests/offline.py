"""The ceiling and the truth: the same model, asked by vLLM alone. Runs as a process of its own.

Reads {"model", "prompts", "chats", "max_tokens"} from the file named first, writes {"prompts", "chats"} to the second.
"""

import json
import sys
from pathlib import Path

ENGINE_KWARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}


def main(request: Path, answers: Path) -> None:
    from vllm import LLM, SamplingParams

    task = json.loads(request.read_text())
    llm = LLM(model=task["model"], **ENGINE_KWARGS)
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"])
    completions = llm.generate(task["prompts"], sampling, use_tqdm=False)
    chats = llm.chat(task["chats"], sampling, use_tqdm=False)
    texts = {
        "prompts": [output.outputs[0].text for output in completions],
        "chats": [output.outputs[0].text for output in chats],
    }
    answers.write_text(json.dumps(texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
