"""What an answer has beside its text, as columns."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from airflow_provider_raylm.specs import Step

_IDS = pa.list_(pa.int32())
_LOGPROB = [("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float64())]
_TOOL_CALL = pa.struct([("id", pa.string()), ("name", pa.string()), ("arguments", pa.string())])
_TYPES: dict[str, pa.DataType] = {
    "reasoning": pa.string(),
    "tool_calls": pa.list_(_TOOL_CALL),
    "logprobs": pa.list_(pa.struct([*_LOGPROB, ("top", pa.list_(pa.struct(_LOGPROB)))])),
    "token_ids": _IDS,
    "prompt_token_ids": _IDS,
}


def kept_fields(step: Step) -> list[pa.Field]:
    """Return the columns of what a step keeps; of several answers each is a list, but for the prompt's ids."""
    return [
        pa.field(
            f"{step.output_column}_{name}",
            pa.list_(_TYPES[name]) if step.n > 1 and name != "prompt_token_ids" else _TYPES[name],
        )
        for name in step.keep
    ]


def request_fields(step: Step) -> dict[str, Any]:
    """Return what the OpenAI request says so that the engine gives what is kept, unless the author says how much."""
    if "logprobs" not in step.keep:
        return {}
    return {"logprobs": 0} if step.prompt is not None else {"logprobs": True, "top_logprobs": 0}
