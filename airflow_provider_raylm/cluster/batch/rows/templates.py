"""Text with holes. Data is never evaluated: a template is cut at its placeholders once, and values are put between."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from airflow_provider_raylm.cluster.batch.exchange import RowError
from airflow_provider_raylm.specs.per_row import PLACEHOLDER

Row = Mapping[str, Any]


def compile_template(template: str) -> Callable[[Row], str]:
    """Return a function that renders *template* for a row.

    A string goes in as it is, so do bytes that are one in UTF-8, a list or a mapping as JSON, anything else as ``str``
    prints it.

    Raises (the returned function):
        RowError: the row's value is null (``null_value``), or bytes that are no text (``unreadable_value``).
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

    holes = list(zip(pieces, names, strict=True))

    def render(row: Row) -> str:
        return "".join([piece + _as_text(required(row, name), name) for piece, name in holes]) + tail

    return render


def required(row: Row, name: str) -> Any:
    """Return a row's value.

    Raises:
        RowError: it is null.
    """
    value = row[name]
    if value is None:
        raise RowError("null_value", f"column {name!r} is null")
    return value


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RowError("unreadable_value", f"column {name!r}: {error}") from error
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
