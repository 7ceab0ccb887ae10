"""What vLLM's OpenAI layer answers, as rows have it; in vLLM's own classes."""

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from airflow_provider_raylm.cluster.replica.questions.answers import of_chat

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def response(*messages, reason="stop", **choice):
    """A response as vLLM builds it."""
    choices = [
        {"index": i, "message": {"role": "assistant", **one}, "finish_reason": reason, **choice}
        for i, one in enumerate(messages)
    ]
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    usage["prompt_tokens_details"] = {"cached_tokens": 4}
    return ChatCompletionResponse(model="m", choices=choices, usage=usage, prompt_token_ids=[1, 2])


def test_what_parsers_take_apart_is_kept():
    """Reasoning, calls, log probabilities and ids; counts are vLLM's."""
    logprobs = {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": [{"token": "b", "logprob": -2.0}]}]}
    told = response({"content": "So.", "reasoning": "Hm", "tool_calls": [CALL]}, logprobs=logprobs, token_ids=[3])
    answer = of_chat(told, ["reasoning", "tool_calls", "logprobs", "token_ids", "prompt_token_ids"])

    assert (answer.value, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("So.", "stop", 5, 7)
    assert answer.cached_tokens == 4
    assert answer.extra == {
        "reasoning": "Hm",
        "tool_calls": [{"id": "c1", "name": "add", "arguments": '{"a": 1}'}],
        "logprobs": [{"token": "a", "logprob": -1.0, "top": [{"token": "b", "logprob": -2.0}]}],
        "token_ids": [3],
        "prompt_token_ids": [1, 2],
    }


def test_reasoning_that_never_ended_is_told():
    """Also when nobody keeps it: a row must not pass for answered with nothing."""
    answer = of_chat(response({"content": None, "reasoning": "Hm"}, reason="length"), [])

    assert (answer.value, answer.finish_reason, answer.extra) == ("", "length", {"reasoning": "Hm"})
    assert of_chat(response({"content": "So.", "reasoning": "Hm"}), []).extra == {}


def test_several_answers_are_lists():
    """One that was cut off makes the row one."""
    answer = of_chat(response({"content": "a", "reasoning": "x"}, {"content": "b", "reasoning": "y"}), ["reasoning"])

    assert (answer.value, answer.extra) == (["a", "b"], {"reasoning": ["x", "y"]})
