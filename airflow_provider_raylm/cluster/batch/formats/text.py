"""What is written as text, perhaps compressed: CSV by pyarrow, JSON and lines by Python."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pc

from airflow_provider_raylm.cluster.batch import json_text
from airflow_provider_raylm.cluster.batch.fragments import Contents, File, Reading
from airflow_provider_raylm.cluster.batch.storage import Place

# A header of many columns; many a small file as a whole.
_BEGINNING_BYTES = 1 << 16
# A cell, or a line, is never longer: pyarrow's reader parses as much at a time.
_CSV_BLOCK_BYTES = 1 << 23
_LINES = 1024


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
        while len(begin) <= _BEGINNING_BYTES and (more := stream.read(_BEGINNING_BYTES)):
            begin += more
    return begin, len(begin) <= _BEGINNING_BYTES


@contextmanager
def _first_bytes(file: File) -> Iterator[Any]:
    if file.size <= _BEGINNING_BYTES:
        with closing(_decompressed(io.BytesIO(Place(file.uri).read()), file)) as stream:
            yield stream
    elif file.compression is None:
        yield io.BytesIO(Place(file.uri).read(0, _BEGINNING_BYTES + 1))
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


def inspect_csv(file: File, how: Reading) -> Contents:
    """Return the columns of a header, and of a small file how many rows there are."""
    begin, whole = _beginning(file)
    # A header may end within the bytes, and a character at their end may not.
    text = begin.decode(how.codec, "strict" if whole else "ignore")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(file, how))
    # As pyarrow does, blank lines are read over.
    names: list[str] = next(filter(None, lines), [])
    schema = _text_schema(names)
    rows = None
    # The caller refuses two columns of one name.
    if whole and len(set(names)) == len(names):
        rows = sum(table.num_rows for table in _parsed(io.BytesIO(begin), file, how, schema)) if names else 0
    return Contents(schema, rows)


def read_csv(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows, as text."""
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


def inspect_json(file: File, how: Reading) -> Contents:
    """Return columns and rows: only reading all of them tells the types."""
    known: dict[str, pa.DataType] = {}
    rows = 0
    with _opened(file) as stream:
        elements = json_text.elements(_as_text(stream, how))
        while chunk := [json_text.parse(*element) for element in islice(elements, _LINES)]:
            json_text.kinds(chunk, known)
            rows += len(chunk)
    return Contents(pa.schema(list(known.items())), rows)


def read_json(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows, in the types of *schema*."""
    with _opened(file) as stream:
        elements = json_text.elements(_as_text(stream, how))
        while chunk := [(text, json_text.parse(where, text)) for where, text in islice(elements, _LINES)]:
            yield json_text.table(chunk, schema)


# --- lines ---


def inspect_lines(file: File, how: Reading) -> Contents:
    """Return the one column, and of a small file how many lines there are."""
    begin, whole = _beginning(file)
    rows = sum(1 for _ in _as_text(io.BytesIO(begin), how)) if whole else None
    return Contents(_text_schema(["text"]), rows)


def read_lines(file: File, how: Reading, _schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield lines."""
    with _opened(file) as stream:
        lines = _as_text(stream, how)
        while chunk := [line.rstrip("\r\n") for line in islice(lines, _LINES)]:
            yield pa.table({"text": pa.array(chunk, pa.string())})
