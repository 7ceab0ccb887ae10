"""Tables as the bytes of a part file."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_provider_raylm.cluster.batch.rows.values import UNREADABLE, exact
from airflow_provider_raylm.specs import OutputFormat


def encode(table: pa.Table, format: OutputFormat) -> bytes:
    """Return a table as Parquet or JSON Lines.

    In JSON, which has neither, bytes are base64 text, and NaN and the infinities are null.
    """
    if format == "parquet":
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, use_dictionary=_with_dictionary(table.schema))
        return bytes(buffer.getvalue())
    columns = [_json_values(column) for column in table.columns]
    rows = (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")


def _with_dictionary(schema: pa.Schema) -> bool | list[str]:
    """Return the columns to write with a dictionary: numbers with a fraction hardly repeat.

    Of 1,536 random floats per row, to try one made writing seven times as long and the file larger by a third.
    """
    if not any(map(_has_fractions, schema.types)):
        return True
    return [field.name for field in schema if not pa.types.is_nested(field.type) and not _has_fractions(field.type)]


def _has_fractions(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_fractions(kind.field(number).type) for number in range(kind.num_fields))
    return bool(pa.types.is_floating(kind))


def writable(schema: pa.Schema, format: OutputFormat) -> str | None:
    """Return which column a format cannot hold, in a sentence, or None."""
    if format == "jsonl":
        return None
    for field in schema:
        try:
            encode(pa.schema([field]).empty_table(), format)
        except pa.ArrowException as error:
            return f"the column {field.name!r} is of type {field.type}, which no {format} file can hold ({error})."
    return None


def _json_values(column: pa.ChunkedArray) -> list[Any]:
    try:
        return [_json_value(value) for value in exact(column).to_pylist()]
    except UNREADABLE:
        return [_one_json_value(value) for value in column]


def _one_json_value(value: pa.Scalar) -> Any:
    """Return a value of which Python knows none: bytes that are no text, a year past 9999."""
    try:
        return _json_value(value.as_py())
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")
    except UNREADABLE:
        one = pa.array([value], value.type)
        if pa.types.is_timestamp(one.type):
            # Without its time zone, which may be unknown, it is UTC.
            one = one.cast(pa.int64()).cast(pa.timestamp(one.type.unit))
        return str(one.cast(pa.string())[0]) if pa.types.is_temporal(one.type) else repr(value)


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_json_value(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _json_value(one) for key, one in value.items()}
    return str(value)
