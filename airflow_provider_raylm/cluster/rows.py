"""Row to request, answer to outcome: pure functions, no Ray, no vLLM.

Data is never evaluated: a template is cut at its placeholders once, and values are put between the pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_raylm.specs import Step

_TOKEN = re.compile(r"\$\$\{|\$\{([^{}]+)\}")

Row = Mapping[str, Any]


class RowError(Exception):
    """One row cannot be asked or was refused; the others go on.

    Attributes:
        reason: a short class of failure, stable enough to count and to filter by.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """What the model said to one row; token counts are vLLM's own."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def placeholders(template: str) -> list[str]:
    """Return the column names in *template*, in order of appearance."""
    return [match.group(1) for match in _TOKEN.finditer(template) if match.group(1)]


def compile_template(template: str) -> Callable[[Row], str]:
    """Return a function that renders *template* for a row.

    A string goes in as it is, a list or a mapping as JSON, anything else as ``str`` prints it.

    Raises (the returned function):
        RowError: the row's value is null (``null_value``).
    """
    pieces: list[str] = []
    names: list[str] = []
    end = 0
    text = ""
    for match in _TOKEN.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        if match.group(1) is None:
            text += "${"
        else:
            pieces.append(text)
            names.append(match.group(1))
            text = ""
    tail = text + template[end:]

    def render(row: Row) -> str:
        out = []
        for piece, name in zip(pieces, names, strict=True):
            out.append(piece)
            out.append(_as_text(name, row[name]))
        out.append(tail)
        return "".join(out)

    return render


def _as_text(name: str, value: Any) -> str:
    if value is None:
        raise RowError("null_value", f"column {name!r} is null")
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def compile_step(step: Step, model: str) -> Callable[[Row], str]:
    """Return a function that turns a row into one OpenAI request as JSON text.

    JSON text, because rows as structs would be merged into one Arrow type: one row's extra key would turn up as
    null in all the others.

    Raises (the returned function):
        RowError: a null value, or a prompt (every message) without content (``empty_prompt``).
    """
    fields = {"model": model, **step.request_fields}
    if step.prompt is not None:
        prompt = compile_template(step.prompt)

        def completion(row: Row) -> str:
            return json.dumps({**fields, "prompt": _not_empty([prompt(row)])[0]})

        return completion

    roles = [message["role"] for message in step.messages or ()]
    contents = [compile_template(message["content"]) for message in step.messages or ()]

    def chat(row: Row) -> str:
        texts = _not_empty([content(row) for content in contents])
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return json.dumps({**fields, "messages": messages})

    return chat


def _not_empty(texts: list[str]) -> list[str]:
    if not any(text.strip() for text in texts):
        raise RowError("empty_prompt", "the rendered prompt is empty")
    return texts


def missing_columns(steps: Iterable[Step], available: Iterable[str]) -> list[str]:
    """Return the columns that templates use and no column or earlier step provides, sorted."""
    known = set(available)
    missing: set[str] = set()
    for step in steps:
        missing |= step.columns_used - known
        known.add(step.output_column)
    return sorted(missing)
