"""The ceiling and the truth: the same model, asked by vLLM alone. Runs as a process of its own.

Reads {"model", "prompts", "chats", "max_tokens", "schema", "choice", "regex", "grammar"} from the file named
first; writes answers to the second: to "prompts" and "chats"; "stops", pairs of sampling parameters that end
answers early, and the answers to the prompts then; answers of the "schema", the "choice", the "regex" and the
"grammar"; "tools", which the "chats" have to use; "own", with parameters of each prompt's own; "several" for
each; and "kept", what else there is of an answer.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

# One process instead of three, which would each import vLLM.
IN_PROCESS = {"distributed_executor_backend": "uni"}
ENGINE_KWARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    # A model with random weights would write white space between JSON's parts for ever.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
TYPED_TOKENS = 80


def main(request: Path, answers: Path) -> None:
    stay_in_process()
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    task = json.loads(request.read_text())
    llm = LLM(model=task["model"], **ENGINE_KWARGS, **IN_PROCESS)
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

    def typed(**constraint):
        parameters = SamplingParams(
            **greedy | {"max_tokens": TYPED_TOKENS}, structured_outputs=StructuredOutputsParams(**constraint)
        )
        return texts(llm.generate(task["prompts"], parameters, use_tqdm=False))

    # What vLLM makes of a tool that has to be used: an answer of its parameters' schema.
    parameters = SamplingParams(
        **greedy | {"max_tokens": TYPED_TOKENS}, structured_outputs=StructuredOutputsParams(json=task["schema"])
    )
    tools = llm.chat(task["chats"], parameters, tools=[tool_of(task["schema"])], use_tqdm=False)
    own = [SamplingParams(**own_of(i)) for i in range(len(task["prompts"]))]
    several = llm.generate(task["prompts"], SamplingParams(n=2, top_k=1, max_tokens=6), use_tqdm=False)
    kept = llm.generate(task["prompts"], SamplingParams(**greedy, logprobs=2), use_tqdm=False)
    found = {
        "prompts": texts(completions),
        "chats": texts(chats),
        "stops": stops,
        "schema": typed(json=task["schema"]),
        "choice": typed(choice=task["choice"]),
        "regex": typed(regex=task["regex"]),
        "grammar": typed(grammar=task["grammar"]),
        "tools": texts(tools),
        "own": texts(llm.generate(task["prompts"], own, use_tqdm=False)),
        "several": [[one.text for one in output.outputs] for output in several],
        "kept": [
            {
                "token_ids": list(output.outputs[0].token_ids),
                "prompt_token_ids": list(output.prompt_token_ids),
                "logprobs": [
                    {str(token): one.logprob for token, one in at.items()} for at in output.outputs[0].logprobs
                ],
            }
            for output in kept
        ],
    }
    answers.write_text(json.dumps(found))


def stay_in_process():
    """Before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def tool_of(schema):
    """Return a tool with parameters of that schema."""
    return {"type": "function", "function": {"name": "rate", "description": "Rate a text.", "parameters": schema}}


def own_of(row):
    """Return the sampling parameters of a row, when each has its own; one answer alone is possible."""
    return {
        "max_tokens": 1 + row % 11,
        "temperature": row % 2 / 2,
        "top_k": 1,
        "top_p": (0.5, 1.0)[row // 2 % 2],
        "min_p": (0.0, 0.1)[row // 3 % 2],
        "stop": (["e", "t"], ["a"], ["no such"])[row % 3],
        "presence_penalty": row % 5 / 4,
        "frequency_penalty": row % 7 / 6,
        "repetition_penalty": 1 + row % 4 / 4,
        "ignore_eos": row % 2 == 0,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
