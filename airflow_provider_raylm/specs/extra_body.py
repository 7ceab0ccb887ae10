"""What an author adds to vLLM's OpenAI request, by vLLM's names: what nobody would heed, or keep, is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# What would break one answer per row, or says again what a field of Step says.
_NOT_ACCEPTED = frozenset(
    {
        *("model", "stream", "best_of", "echo", "request_id", "session_id"),
        *("max_completion_tokens", "use_beam_search", "prompt_embeds"),
    }
)
# What vLLM takes and makes nothing of, for a row of a batch.
_NO_EFFECT = frozenset(
    {
        *("suffix", "user", "length_penalty", "stream_options", "stream_interval"),
        *("return_token_offsets", "return_assistant_tokens_mask"),
    }
)
# What is paid for and has to be kept, then.
_KEPT_BY = {
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "logprob_token_ids": "logprobs",
    "tools": "tool_calls",
    "return_token_ids": "token_ids",
}
_NEVER_KEPT = frozenset(
    {"prompt_logprobs", "return_tokens_as_token_ids", "return_prompt_text", "routed_experts_prompt_start"}
)


def check_extra_body(
    body: Mapping[str, Any], kinds: Collection[str], own: Collection[str], keep: Collection[str]
) -> None:
    """Check that all of it is heeded.

    Args:
        body: the author's fields.
        kinds: the fields that ask the step's question.
        own: fields of Step that may not stand here, too.
        keep: what is kept of an answer.

    Raises:
        ValueError: something is not; the text names it.
    """
    for name in sorted(body):
        if name in own:
            raise ValueError(f"extra_body.{name}: it is a field of its own")
        if name in _NOT_ACCEPTED:
            raise ValueError(f"extra_body.{name}: not accepted here")
        if name in _NO_EFFECT:
            raise ValueError(f"extra_body.{name}: has no effect; leave it out")
        if name in _NEVER_KEPT:
            raise ValueError(f"extra_body.{name}: its result has no column, so it would be paid for and dropped")
        kept = _KEPT_BY.get(name)
        if kept is not None and kept not in keep:
            raise ValueError(f"extra_body.{name}: its result would be dropped; add keep=[{kept!r}] or leave it out")
    if "use_activation" in body and "embed" in kinds:
        raise ValueError("extra_body.use_activation: it is a field of its own, normalize")
    if body.get("include_reasoning") is False:
        raise ValueError("extra_body.include_reasoning: reasoning is left out unless keep names it; leave this out")
    _check_logprobs(body, kinds)


def _check_logprobs(body: Mapping[str, Any], kinds: Collection[str]) -> None:
    """Refuse the other API's way to ask for log probabilities: of a chat it is a word, of a prompt a number."""
    if "logprobs" not in body:
        return
    told = body["logprobs"]
    if "messages" in kinds and told is not True and not isinstance(told, str):
        raise ValueError(
            f"extra_body.logprobs: a chat has top_logprobs for how many, and true or nothing here, got {told}"
        )
    if "prompt" in kinds and (told is None or isinstance(told, bool)):
        raise ValueError(f"extra_body.logprobs: of a prompt it is how many of the likeliest tokens, got {told}")
