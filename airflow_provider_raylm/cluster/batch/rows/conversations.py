"""The messages of a chat: templates, and turns that a row brings along."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from airflow_provider_raylm.cluster.batch.exchange import RowError
from airflow_provider_raylm.cluster.batch.rows.images import image_address
from airflow_provider_raylm.cluster.batch.rows.templates import Row, compile_template, required
from airflow_provider_raylm.specs import Media, Step
from airflow_provider_raylm.specs.per_row import column_of
from airflow_provider_raylm.specs.turns import ImagePart

Message = dict[str, Any]

# ShareGPT's names, which many conversations on the Hugging Face hub have.
_ROLES = {"human": "user", "gpt": "assistant"}
_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning")


def compile_messages(step: Step, media: Media) -> Callable[[Row], list[Message]]:
    """Return a function that makes a row's messages, with the images that *media* allows.

    Raises (the returned function):
        RowError: a value is null, turns that are none (``invalid_conversation``), nothing is said (``empty_prompt``),
            or an image that cannot be had (``invalid_image``).
        BatchError: the storage refused an image.
    """
    turns = (step.messages,) if isinstance(step.messages, str) else step.messages or ()
    makers = [_turns_of(column, media) if (column := column_of(turn)) else _message(turn, media) for turn in turns]

    def messages(row: Row) -> list[Message]:
        made = [message for maker in makers for message in maker(row)]
        if not any(_says_something(message) for message in made):
            raise RowError("empty_prompt", "the conversation is empty")
        return made

    return messages


def may_hold_images(step: Step) -> bool:
    """Return whether a row's messages may have images: parts that the author wrote, or a row's own turns."""
    turns = (step.messages,) if isinstance(step.messages, str) else step.messages or ()
    return any(isinstance(turn, str) or not isinstance(turn["content"], str) for turn in turns)


def _message(turn: Any, media: Media) -> Callable[[Row], list[Message]]:
    role, content = turn["role"], turn["content"]
    if isinstance(content, str):
        render = compile_template(content)
        return lambda row: [{"role": role, "content": render(row)}]
    makers = [_image(part, media) if isinstance(part, ImagePart) else _text(part.text) for part in content]
    return lambda row: [{"role": role, "content": [make(row) for make in makers]}]


def _text(template: str) -> Callable[[Row], Message]:
    render = compile_template(template)
    return lambda row: {"type": "text", "text": render(row)}


def _image(part: ImagePart, media: Media) -> Callable[[Row], Message]:
    column = column_of(part.image_url.url)
    value = partial(required, name=column) if column else compile_template(part.image_url.url)
    return lambda row: _image_part(value(row), media)


def _image_part(value: Any, media: Media) -> Message:
    return {"type": "image_url", "image_url": {"url": image_address(value, media)}}


def _turns_of(column: str, media: Media) -> Callable[[Row], list[Message]]:
    def turns(row: Row) -> list[Message]:
        given = required(row, column)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                raise _bad(column, "its text is no JSON") from None
            except RecursionError:
                raise _bad(column, "its text is nested too deep") from None
        given = _plain(given)
        if not isinstance(given, list):
            raise _bad(column, "it is no list of turns")
        return [_turn(column, number, turn, media) for number, turn in enumerate(given)]

    return turns


def _turn(column: str, number: int, turn: Any, media: Media) -> Message:
    if not isinstance(turn, Mapping):
        raise _bad(column, f"turn {number} is no object")
    role = turn.get("role") or turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(role, str):
        raise _bad(column, f"turn {number} has no role (or from)")
    # Structs of a column have the fields of all turns: null is what a turn does not have.
    further = {name: value for name in _FIELDS if (value := _plain(turn.get(name)))}
    if content is None and not further.get("tool_calls"):
        raise _bad(column, f"turn {number} has no content (or value)")
    return {"role": _ROLES.get(role, role), "content": _content(column, number, content, media), **further}


def _plain(value: Any) -> Any:
    """Return a value with a list in place of what a row function may have made of one."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _content(column: str, number: int, content: Any, media: Media) -> Any:
    content = _plain(content)
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(column, f"the content of turn {number} is neither text nor a list of parts")
    return [_part(column, number, part, media) for part in content]


def _part(column: str, number: int, part: Any, media: Media) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        image = part.get("image_url")
        return _image_part(image.get("url") if isinstance(image, Mapping) else image, media)
    if kind == "image":
        return _image_part(part.get("image"), media)
    # Whatever else names a place, which the engine would fetch on whoever's word wrote the row.
    raise _bad(column, f"turn {number} has a part that is neither text nor an image")


def _says_something(message: Message) -> bool:
    content = message["content"]
    if isinstance(content, list):
        return any(part["type"] != "text" or part["text"].strip() for part in content)
    return bool(content and content.strip()) or bool(message.get("tool_calls"))


def _bad(column: str, why: str) -> RowError:
    return RowError("invalid_conversation", f"column {column!r}: {why}")
