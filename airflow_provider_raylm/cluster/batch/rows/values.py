"""Columns as Python values: which a step needs, and which of them have none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Refusal
from airflow_provider_raylm.specs import Step

UNREADABLE = (ValueError, OverflowError, KeyError, pa.ArrowException)
"""What pyarrow raises of a value that Python has none for: no text, a year past 9999, an unknown time zone."""


def missing_columns(steps: Iterable[Step], available: Iterable[str]) -> list[str]:
    """Return the columns that steps use and no column or earlier step provides, sorted."""
    known = set(available)
    missing: set[str] = set()
    for step in steps:
        missing |= step.columns_used - known
        known.update(step.output_columns)
    return sorted(missing)


def values(table: pa.Table, columns: Iterable[str]) -> tuple[list[dict[str, Any]], dict[int, Refusal]]:
    """Return the rows of a table with the values of some columns, and by number the rows in which one has none."""
    found: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    bad: dict[int, Refusal] = {}
    for name in columns:
        try:
            column = exact(table[name]).to_pylist()
        except UNREADABLE:
            column = [_value(name, value, number, bad) for number, value in enumerate(table[name])]
        for row, value in zip(found, column, strict=True):
            row[name] = value
    return found, bad


def exact(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of which Python's values lose nothing: a time of day has no nanoseconds there, and is text."""
    if (shorter := _with_times(column.type, pa.time64("us"))).equals(column.type):
        return column
    try:
        return column.cast(shorter)
    except pa.ArrowInvalid:
        return column.cast(_with_times(column.type, pa.string()))


def _with_times(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type with *other* in the place of times of day with nanoseconds."""
    if kind.equals(pa.time64("ns")):
        return other
    if pa.types.is_dictionary(kind):
        inner = _with_times(kind.value_type, other)
        return kind if inner.equals(kind.value_type) else inner
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_with_times(one.type, other)) for one in kind])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, _with_times(kind.item_type, other))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_times(kind.value_type, other)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_with_times(kind.value_type, other)), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_with_times(kind.value_type, other)))
    return kind


def _value(name: str, value: pa.Scalar, number: int, bad: dict[int, Refusal]) -> Any:
    try:
        return value.as_py()
    except UNREADABLE as error:
        bad.setdefault(number, Refusal("unreadable_value", f"column {name!r}: {error}"))
        return None
