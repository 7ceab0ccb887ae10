"""What is written as text, perhaps compressed: its bytes, piece by piece; JSON and lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch import json_text
from airflow_provider_raylm.cluster.batch.fragments import Contents, File, Reading
from airflow_provider_raylm.cluster.batch.storage import Place

# A header of many columns; many a small file as a whole.
_BEGINNING_BYTES = 1 << 16
_LINES = 1024
MARK = "\ufeff"
"""What may stand at the beginning of a file and is no text of it."""


@contextmanager
def opened(file: File) -> Iterator[IO[bytes]]:
    """Open what a file holds, decompressed."""
    place = Place(file.uri)
    with place.fs.open(place.path, "rb") as stream, closing(_decompressed(stream, file)) as plain_stream:
        yield plain_stream


def _decompressed(stream: Any, file: File) -> Any:
    if file.compression is None:
        return stream
    return pa.PythonFile(pa.CompressedInputStream(pa.PythonFile(stream, "r"), file.compression), "r")


def beginning(file: File) -> tuple[bytes, bool]:
    """Return the first bytes of what a file holds, and whether that is all."""
    with _first_bytes(file) as stream:
        return beginning_of(pieces(stream))


def beginning_of(every: Iterator[bytes]) -> tuple[bytes, bool]:
    """Return the first of some pieces of bytes as one, and whether these are all; others are left."""
    begin = b""
    for piece in every:
        begin += piece
        if len(begin) > _BEGINNING_BYTES:
            return begin, False
    return begin, True


@contextmanager
def _first_bytes(file: File) -> Iterator[Any]:
    if file.size <= _BEGINNING_BYTES:
        with closing(_decompressed(io.BytesIO(Place(file.uri).read()), file)) as stream:
            yield stream
    elif file.compression is None:
        yield io.BytesIO(Place(file.uri).read(0, _BEGINNING_BYTES + 1))
    else:
        with opened(file) as stream:
            yield stream


def pieces(stream: Any) -> Iterator[bytes]:
    """Yield what a stream holds."""
    return iter(partial(stream.read, _BEGINNING_BYTES), b"")


def as_text(every: Iterator[bytes], how: Reading, newline: str | None = None) -> IO[str]:
    """Return pieces of bytes as text, without a mark at its beginning."""
    stream = io.BufferedReader(Joined(_without_mark(every, how.encoding)))
    return io.TextIOWrapper(stream, encoding=how.encoding, newline=newline)


def _without_mark(every: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    try:
        mark = MARK.encode(encoding)
    except UnicodeEncodeError:
        mark = b""
    begin = b""
    for piece in every:
        begin += piece
        if len(begin) >= len(mark):
            break
    yield begin.removeprefix(mark)
    yield from every


class Joined(io.RawIOBase):
    """Pieces of bytes as one stream."""

    def __init__(self, every: Iterator[bytes]) -> None:
        self._pieces = filter(None, every)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the next piece does, and return how far."""
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def text_schema(names: list[str]) -> pa.Schema:
    """Return a schema of text columns."""
    return pa.schema([(name, pa.string()) for name in names])


# --- JSON ---


def inspect_json(file: File, how: Reading) -> Contents:
    """Return columns and rows: only reading all of them tells the types."""
    known: dict[str, pa.DataType] = {}
    rows = 0
    with opened(file) as stream:
        elements = json_text.elements(as_text(pieces(stream), how))
        while chunk := [json_text.parse(*element) for element in islice(elements, _LINES)]:
            json_text.kinds(chunk, known)
            rows += len(chunk)
    return Contents(pa.schema(list(known.items())), rows)


def read_json(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows, in the types of *schema*."""
    with opened(file) as stream:
        elements = json_text.elements(as_text(pieces(stream), how))
        while chunk := [(text, json_text.parse(where, text)) for where, text in islice(elements, _LINES)]:
            yield json_text.table(chunk, schema)


# --- lines ---


def inspect_lines(file: File, how: Reading) -> Contents:
    """Return the one column, and of a small file how many lines there are."""
    begin, whole = beginning(file)
    rows = sum(1 for _ in as_text(iter([begin]), how)) if whole else None
    return Contents(text_schema(["text"]), rows)


def read_lines(file: File, how: Reading, _schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield lines."""
    with opened(file) as stream:
        lines = as_text(pieces(stream), how)
        while chunk := [line.rstrip("\r\n") for line in islice(lines, _LINES)]:
            yield pa.table({"text": pa.array(chunk, pa.string())})
