"""Row to request, answer to outcome: pure, no Ray, no vLLM.

Data is never evaluated: a template is cut at its placeholders once, and values are put between the pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.specs import Step
from airflow_provider_raylm.specs.batch import PLACEHOLDER

UNREADABLE = (ValueError, OverflowError, KeyError, pa.ArrowException)
"""What pyarrow raises of a value that Python has none for: no text, a year past 9999, an unknown time zone."""

Row = Mapping[str, Any]
Content = str | list[dict[str, str]]
"""What differs from row to row in a request: a prompt, or the messages of a chat."""


class RowError(Exception):
    """One row cannot be asked; the others go on. Its arguments are those of a ``Refusal``."""

    @property
    def refusal(self) -> Refusal:
        """The reason as a value."""
        return Refusal(*self.args)


@dataclass(frozen=True)
class Answer:
    """What the model said to one row; token counts are vLLM's own."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Refusal:
    """Why a row has no answer.

    Attributes:
        reason: a short class of failure, stable enough to count and to filter by.
        message: the whole sentence.
    """

    reason: str
    message: str


Outcome = Answer | Refusal
"""What comes of a row."""


@dataclass(frozen=True)
class Part:
    """What a replica says of a block while it answers it.

    Attributes:
        replica: who says it.
        begun: whether a row of the block has entered the engine.
        outcomes: of the rows that have ended since the part before, by their number in the block.
    """

    replica: str
    begun: bool
    outcomes: list[tuple[int, Outcome]]


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
    for match in PLACEHOLDER.finditer(template):
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


def shared_fields(step: Step, model: str) -> str:
    """Return what the OpenAI requests of all rows share, as JSON text."""
    return json.dumps({"model": model, **step.request_fields})


def compile_step(step: Step) -> Callable[[Row], Content]:
    """Return a function that renders what is a row's own in its request.

    Raises (the returned function):
        RowError: a null value, or a prompt (every message) without content (``empty_prompt``).
    """
    if step.prompt is not None:
        prompt = compile_template(step.prompt)
        return lambda row: _not_empty([prompt(row)])[0]

    roles = [message["role"] for message in step.messages or ()]
    contents = [compile_template(message["content"]) for message in step.messages or ()]

    def chat(row: Row) -> list[dict[str, str]]:
        texts = _not_empty([content(row) for content in contents])
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]

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


def values(table: pa.Table, columns: Iterable[str]) -> tuple[list[dict[str, Any]], dict[int, Refusal]]:
    """Return the rows of a table with the values of some columns, and by number the rows in which one has none."""
    found: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    bad: dict[int, Refusal] = {}
    for name in columns:
        try:
            column = table[name].to_pylist()
        except UNREADABLE:
            column = [_value(name, value, number, bad) for number, value in enumerate(table[name])]
        for row, value in zip(found, column, strict=True):
            row[name] = value
    return found, bad


def _value(name: str, value: pa.Scalar, number: int, bad: dict[int, Refusal]) -> Any:
    try:
        return value.as_py()
    except UNREADABLE as error:
        bad.setdefault(number, Refusal("unreadable_value", f"column {name!r}: {error}"))
        return None
