"""What vLLM answers, as an Answer: from its engine's outputs, and from its OpenAI layer's responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow_provider_raylm.cluster.batch.exchange import Answer


def of_output(output: Any, texts: Sequence[str], keep: Sequence[str]) -> Answer:
    """Return what the engine gave for one row.

    Args:
        output: vLLM's RequestOutput.
        texts: of its answers.
        keep: what of it is wanted beside the text.
    """
    extra: dict[str, Any] = {}
    if "prompt_token_ids" in keep:
        extra["prompt_token_ids"] = list(output.prompt_token_ids or ())
    if "token_ids" in keep:
        extra["token_ids"] = _one_or_all([list(one.token_ids) for one in output.outputs])
    if "logprobs" in keep:
        extra["logprobs"] = _one_or_all([_logprobs(one) for one in output.outputs])
    return Answer(
        _one_or_all(list(texts)),
        _finish_reason([one.finish_reason for one in output.outputs]),
        len(output.prompt_token_ids or ()),
        sum(len(one.token_ids) for one in output.outputs),
        output.num_cached_tokens or 0,
        extra,
    )


def of_chat(response: Any, keep: Sequence[str]) -> Answer:
    """Return what vLLM's chat API answered, whose parsers have taken the answer apart."""
    choices = response.choices
    messages = [choice.message for choice in choices]
    extra: dict[str, Any] = {}
    if "reasoning" in keep or not any(message.content for message in messages):
        extra["reasoning"] = _one_or_all([message.reasoning for message in messages])
    if "tool_calls" in keep:
        extra["tool_calls"] = _one_or_all([_tool_calls(message) for message in messages])
    if "logprobs" in keep:
        extra["logprobs"] = _one_or_all([_layer_logprobs(choice.logprobs) for choice in choices])
    if "token_ids" in keep:
        extra["token_ids"] = _one_or_all([choice.token_ids for choice in choices])
    if "prompt_token_ids" in keep:
        extra["prompt_token_ids"] = response.prompt_token_ids
    usage = response.usage
    details = usage.prompt_tokens_details
    return Answer(
        _one_or_all([message.content or "" for message in messages]),
        _finish_reason([choice.finish_reason for choice in choices]),
        usage.prompt_tokens,
        usage.completion_tokens,
        (details.cached_tokens if details else None) or 0,
        extra,
    )


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _finish_reason(reasons: Sequence[str | None]) -> str:
    """Return the one that says most: an answer that was cut off makes the row one."""
    return "length" if "length" in reasons else reasons[0] or ""


def _logprobs(answer: Any) -> list[dict[str, Any]]:
    found = []
    for token_id, at in zip(answer.token_ids, answer.logprobs, strict=True):
        others = [_logprob(one, at[one]) for one in at if one != token_id]
        found.append({**_logprob(token_id, at[token_id]), "top": others})
    return found


def _logprob(token_id: int, logprob: Any) -> dict[str, Any]:
    return {"token_id": token_id, "token": logprob.decoded_token, "logprob": logprob.logprob}


def _layer_logprobs(logprobs: Any) -> list[dict[str, Any]]:
    return [
        {
            "token": at.token,
            "logprob": at.logprob,
            "top": [
                {"token": one.token, "logprob": one.logprob} for one in at.top_logprobs or () if one.token != at.token
            ],
        }
        for at in (logprobs.content if logprobs else None) or ()
    ]


def _tool_calls(message: Any) -> list[dict[str, str]]:
    return [
        {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        for call in message.tool_calls or ()
    ]
