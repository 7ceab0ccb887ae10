"""What is in one file, and its rows as tables: Parquet by its row groups, CSV by pyarrow, JSON and text by lines.

A file's first or last bytes tell its columns, and of a small file everything, with one request to the storage.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from airflow_provider_raylm.cluster.batch import json_text
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, Contents, File, Reading
from airflow_provider_raylm.cluster.batch.ids import hashes, id_texts, is_id_type
from airflow_provider_raylm.cluster.batch.storage import Place, reading
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
# A footer of a few hundred columns and row groups; many a small file as a whole.
_ENDS_BYTES = 1 << 16
# A cell, or a line, is never longer: pyarrow's reader parses as much at a time.
_CSV_BLOCK_BYTES = 1 << 23
_LINES = 1024
# Of a row group, decoded at a time: what is read ahead of the blocks is not more, however wide rows are.
_BATCH_BYTES = 1 << 24
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
        looks = {"parquet": _inspect_parquet, "jsonl": _inspect_json, "csv": _inspect_csv, "text": _inspect_text}
        found = looks[file.format](file, how)
        twice = sorted({name for name in found.schema.names if found.schema.names.count(name) > 1})
        if twice:
            raise BatchError(f"{file.uri} has several columns of the name {twice[0]!r}. Name each column differently.")
    if id_name(found.schema, how) is None or found.ids is not None:
        return found
    ids = [hashes(texts) for texts in ids_of(file, how, found.schema)]
    return Contents(found.schema, found.rows, np.concatenate(ids) if ids else np.empty(0, np.uint64))


def id_name(schema: pa.Schema, how: Reading) -> str | None:
    """Return the column of a file that has its rows' ids, or None."""
    return how.id_column or (ROW_ID if ROW_ID in schema.names else None)


def ids_of(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.ChunkedArray]:
    """Yield the ids that a column of the file gives its rows, as text."""
    name = how.id_column or ROW_ID
    with reading(file.uri, file.format):
        _require_id_type(file.uri, schema, name)
        for _, table in tables(file, how, pa.schema([schema.field(name)])):
            yield id_texts(file.uri, name, table[name])


def _require_id_type(uri: str, schema: pa.Schema, name: str) -> None:
    if name not in schema.names:
        raise BatchError(f"{uri}: no column {name!r}, which id_column names; it has {', '.join(schema.names)}")
    kind = schema.field(name).type
    if not is_id_type(kind) and not pa.types.is_null(kind):
        raise BatchError(
            f"{uri}: the column {name!r} is of type {kind}, which cannot be an id; choose another id_column"
        )


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
        yield from _read_parquet(file, schema, wanted_from)
        return
    read = {"csv": _read_csv, "jsonl": _read_json, "text": _read_text}[file.format]
    position = 0
    for table in read(file, how, schema):
        yield position, table
        position += table.num_rows


def plain(schema: pa.Schema) -> pa.Schema:
    """Return a schema without views, which hold what plain strings and bytes hold."""
    return pa.schema([field.with_type(_plain(field.type)) for field in schema])


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([one.with_type(_plain(one.type)) for one in kind])
    return _VIEWS.get(kind, kind)


# --- Parquet ---


def _inspect_parquet(file: File, how: Reading) -> Contents:
    size = min(file.size, _ENDS_BYTES)
    end = Place(file.uri).read(file.size - size, file.size)
    footer = int.from_bytes(end[-8:-4], "little") + 8
    if end.endswith(b"PAR1") and size < footer <= file.size:
        end = Place(file.uri).read(file.size - footer, file.size)
    metadata = pq.read_metadata(io.BytesIO(end))
    schema = metadata.schema.to_arrow_schema().remove_metadata()
    ids = None
    name = id_name(schema, how)
    if name is not None and len(end) == file.size:
        _require_id_type(file.uri, schema, name)
        column = pq.read_table(io.BytesIO(end), columns=[name])[name]
        ids = hashes(id_texts(file.uri, name, column))
    return Contents(schema, metadata.num_rows, ids)


def _read_parquet(file: File, schema: pa.Schema, wanted_from: Callable[[], int]) -> Iterator[tuple[int, pa.Table]]:
    with Place(file.uri).open() as stream:
        opened = pq.ParquetFile(stream)
        names = [name for name in schema.names if name in opened.schema_arrow.names]
        position = 0
        for group in range(opened.num_row_groups):
            end = position + opened.metadata.row_group(group).num_rows
            if end > wanted_from():
                if not names:
                    yield position, pa.table({"": pa.nulls(end - position)}).select([])
                else:
                    rows = _batch_rows(opened.metadata.row_group(group), names)
                    for batch in opened.iter_batches(rows, row_groups=[group], columns=names):
                        # By name: a column "a" brings what is called "a.b", too.
                        yield position, pa.Table.from_batches([batch]).select(names)
                        position += batch.num_rows
            position = end


def _batch_rows(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """Return how many rows of a row group are read at a time."""
    chunks = (group.column(number) for number in range(group.num_columns))
    nbytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names)
    return int(max(1, min(_LINES, _BATCH_BYTES * group.num_rows // max(nbytes, 1))))


# --- text of some kind ---


@contextmanager
def _opened(file: File) -> Iterator[IO[bytes]]:
    place = Place(file.uri)
    with place.fs.open(place.path, "rb") as stream, closing(_decompressed(stream, file)) as plain_stream:
        yield plain_stream


def _decompressed(stream: Any, file: File) -> Any:
    if file.compression is None:
        return stream
    return pa.PythonFile(pa.CompressedInputStream(pa.PythonFile(stream, "r"), file.compression), "r")


def _beginning(file: File) -> tuple[bytes, bool]:
    """Return the first bytes of what a file holds, and whether that is all."""
    with _first_bytes(file) as stream:
        begin = b""
        while len(begin) <= _ENDS_BYTES and (more := stream.read(_ENDS_BYTES)):
            begin += more
    return begin, len(begin) <= _ENDS_BYTES


@contextmanager
def _first_bytes(file: File) -> Iterator[Any]:
    if file.size <= _ENDS_BYTES:
        with closing(_decompressed(io.BytesIO(Place(file.uri).read()), file)) as stream:
            yield stream
    elif file.compression is None:
        yield io.BytesIO(Place(file.uri).read(0, _ENDS_BYTES + 1))
    else:
        with _opened(file) as stream:
            yield stream


def _as_text(stream: Any, how: Reading) -> IO[str]:
    return io.TextIOWrapper(io.BufferedReader(_Raw(stream)), encoding=how.codec)


class _Raw(io.RawIOBase):
    """A stream as Python's own readers take it; pyarrow's lack half of the methods."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _text_schema(names: list[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


# --- CSV: every column as text, because a type guessed from the first rows fails, or changes, at a later one ---


def _inspect_csv(file: File, how: Reading) -> Contents:
    begin, whole = _beginning(file)
    # A header may end within the bytes, and a character at their end may not.
    text = begin.decode(how.codec, "strict" if whole else "ignore")
    names = next(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(file, how)), [])
    schema = _text_schema(names)
    rows = None
    # The caller refuses two columns of one name.
    if whole and len(set(names)) == len(names):
        rows = sum(table.num_rows for table in _parsed(io.BytesIO(begin), file, how, schema)) if names else 0
    return Contents(schema, rows)


def _read_csv(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    with _opened(file) as stream:
        yield from _parsed(stream, file, how, schema)


def _parsed(stream: Any, file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    texts = {name: pa.string() for name in schema.names}
    options = pc.ConvertOptions(column_types=texts, strings_can_be_null=False)
    # By the author's name, not the codec's: pyarrow itself leaves the mark of UTF-8 out.
    reading_options = pc.ReadOptions(block_size=_CSV_BLOCK_BYTES, encoding=how.encoding, use_threads=False)
    parsing = pc.ParseOptions(delimiter=_delimiter(file, how), newlines_in_values=True)
    with pc.open_csv(stream, reading_options, parsing, options) as reader:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            yield table.select([name for name in schema.names if name in table.column_names])


def _delimiter(file: File, how: Reading) -> str:
    return how.delimiter or ("\t" if ".tsv" in file.uri.lower().rpartition("/")[2] else ",")


# --- JSON ---


def _inspect_json(file: File, how: Reading) -> Contents:
    known: dict[str, pa.DataType] = {}
    rows = 0
    with _opened(file) as stream:
        elements = json_text.elements(_as_text(stream, how))
        while chunk := [json_text.parse(*element) for element in islice(elements, _LINES)]:
            json_text.kinds(chunk, known)
            rows += len(chunk)
    return Contents(pa.schema(list(known.items())), rows)


def _read_json(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    with _opened(file) as stream:
        elements = json_text.elements(_as_text(stream, how))
        while chunk := [(text, json_text.parse(where, text)) for where, text in islice(elements, _LINES)]:
            yield json_text.table(chunk, schema)


# --- lines ---


def _inspect_text(file: File, how: Reading) -> Contents:
    begin, whole = _beginning(file)
    rows = sum(1 for _ in _as_text(io.BytesIO(begin), how)) if whole else None
    return Contents(_text_schema(["text"]), rows)


def _read_text(file: File, how: Reading, _schema: pa.Schema) -> Iterator[pa.Table]:
    with _opened(file) as stream:
        lines = _as_text(stream, how)
        while chunk := [line.rstrip("\r\n") for line in islice(lines, _LINES)]:
            yield pa.table({"text": pa.array(chunk, pa.string())})
