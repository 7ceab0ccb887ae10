"""What is in one file, and its rows as tables, whatever its format.

A file's first or last bytes tell its columns, and of a small file everything, with one request to the storage.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import numpy as np
import pyarrow as pa

from airflow_provider_raylm.cluster.batch.formats import csv_text, parquet, text
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, Contents, File, Reading
from airflow_provider_raylm.cluster.batch.ids import hashes, id_name, id_texts, require_id_type
from airflow_provider_raylm.cluster.batch.storage import reading
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import Format

_FORMATS: dict[str, Format] = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "tsv": "csv",
    "txt": "text",
}
_COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "zstd": "zstd", "lz4": "lz4"}
_LOOKS = {
    "parquet": parquet.inspect,
    "csv": csv_text.inspect_csv,
    "jsonl": text.inspect_json,
    "text": text.inspect_lines,
}
_READS = {"csv": csv_text.read_csv, "jsonl": text.read_json, "text": text.read_lines}
# What pyarrow reads but cannot compute with, and what holds the same.
_VIEWS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}


def format_of(path: str, chosen: Format | None) -> tuple[Format, str | None] | None:
    """Return a file's format and compression by its suffixes, or None if they tell no format."""
    name, _, last = path.lower().rpartition(".")
    compression = _COMPRESSIONS.get(last)
    suffix = name.rpartition(".")[2] if compression else last
    found = chosen or _FORMATS.get(suffix)
    return (found, None if found == "parquet" else compression) if found else None


def inspect(file: File, how: Reading) -> Contents:
    """Look at a file once.

    Raises:
        BatchError: it cannot be read, or two columns have one name, or its id column cannot give ids.
    """
    with reading(file.uri, file.format):
        found = _LOOKS[file.format](file, how)
        twice = sorted({name for name in found.schema.names if found.schema.names.count(name) > 1})
        if twice:
            raise BatchError(f"{file.uri} has several columns of the name {twice[0]!r}. Name each column differently.")
    # An empty file says nothing of columns.
    is_empty = not found.schema.names and found.rows == 0
    if is_empty or id_name(found.schema, how) is None or found.ids is not None:
        return found
    ids = [hashes(texts) for texts in ids_of(file, how, found.schema)]
    return Contents(found.schema, found.rows, np.concatenate(ids) if ids else np.empty(0, np.uint64))


def ids_of(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.ChunkedArray]:
    """Yield the ids that a column of the file gives its rows, as text."""
    name = how.id_column or ROW_ID
    with reading(file.uri, file.format):
        require_id_type(file.uri, schema, name)
        for _, table in tables(file, how, pa.schema([schema.field(name)])):
            yield id_texts(file.uri, name, table[name])


def tables(
    file: File, how: Reading, schema: pa.Schema, wanted_from: Callable[[], int] = lambda: 0
) -> Generator[tuple[int, pa.Table]]:
    """Yield (position of the first row, rows) over a file in order, of *schema*'s columns those that it has.

    Args:
        file: which.
        how: how to read it.
        schema: what is wanted; JSON takes the types from it.
        wanted_from: says, while it is read, which rows are not wanted any more: those before this position. Row groups
            of them are not read.
    """
    if file.format == "parquet":
        yield from parquet.read(file, schema, wanted_from)
        return
    position = 0
    for table in _READS[file.format](file, how, schema):
        yield position, table
        position += table.num_rows


def samples(file: File, how: Reading, field: pa.Field) -> Iterator[pa.ChunkedArray]:
    """Yield values of a column that any other of it lies between: what a footer tells of them, or all."""
    extremes = parquet.extremes(file, field) if file.format == "parquet" else None
    if extremes is not None:
        yield extremes
        return
    for _, table in tables(file, how, pa.schema([field])):
        yield table[field.name]


def plain(schema: pa.Schema) -> pa.Schema:
    """Return a schema without views, which hold what plain strings and bytes hold."""
    return pa.schema([field.with_type(_plain(field.type)) for field in schema])


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_plain(one.type)) for one in kind])
    return _VIEWS.get(kind, kind)
