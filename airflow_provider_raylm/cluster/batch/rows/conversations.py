"""The messages of a chat: templates, and turns that a row brings along."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from airflow_provider_raylm.cluster.batch.exchange import RowError
from airflow_provider_raylm.cluster.batch.rows.templates import Row, compile_template, required
from airflow_provider_raylm.specs import Step
from airflow_provider_raylm.specs.step import column_of

Message = dict[str, Any]

# ShareGPT's names, which many conversations on the Hugging Face hub have.
_ROLES = {"human": "user", "gpt": "assistant"}
_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning")


def compile_messages(step: Step) -> Callable[[Row], list[Message]]:
    """Return a function that makes a row's messages.

    Raises (the returned function):
        RowError: a value is null, turns that are none (``invalid_conversation``), or nothing is said
            (``empty_prompt``).
    """
    turns = (step.messages,) if isinstance(step.messages, str) else step.messages or ()
    makers = [_turns_of(column) if (column := column_of(turn)) else _message(turn) for turn in turns]

    def messages(row: Row) -> list[Message]:
        made = [message for maker in makers for message in maker(row)]
        if not any(_says_something(message) for message in made):
            raise RowError("empty_prompt", "the conversation is empty")
        return made

    return messages


def _message(turn: Any) -> Callable[[Row], list[Message]]:
    role, content = turn["role"], compile_template(turn["content"])
    return lambda row: [{"role": role, "content": content(row)}]


def _turns_of(column: str) -> Callable[[Row], list[Message]]:
    def turns(row: Row) -> list[Message]:
        given = required(row, column)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                raise _bad(column, "its text is no JSON") from None
        if not isinstance(given, list):
            raise _bad(column, "it is no list of turns")
        return [_turn(column, number, turn) for number, turn in enumerate(given)]

    return turns


def _turn(column: str, number: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise _bad(column, f"turn {number} is no object")
    role = turn.get("role") or turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(role, str):
        raise _bad(column, f"turn {number} has no role (or from)")
    # Structs of a column have the fields of all turns: null is what a turn does not have.
    further = {name: turn[name] for name in _FIELDS if turn.get(name)}
    if content is None and not further.get("tool_calls"):
        raise _bad(column, f"turn {number} has no content (or value)")
    return {"role": _ROLES.get(role, role), "content": _content(column, number, content), **further}


def _content(column: str, number: int, content: Any) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(column, f"the content of turn {number} is neither text nor a list of parts")
    parts = []
    for part in content:
        # Whatever else names a place, which the engine would fetch on whoever's word wrote the row.
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _bad(column, f"turn {number} has a part that is no text")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _says_something(message: Message) -> bool:
    content = message["content"]
    if isinstance(content, list):
        return any(part["text"].strip() for part in content)
    return bool(content and content.strip()) or bool(message.get("tool_calls"))


def _bad(column: str, why: str) -> RowError:
    return RowError("invalid_conversation", f"column {column!r}: {why}")
