"""CSV, as Excel, Spark and others write it: read by pyarrow, every column as text.

A type guessed from the first rows fails, or changes, at a later one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv_reader

from airflow_provider_raylm.cluster.batch.formats.text import (
    MARK,
    Joined,
    as_text,
    beginning,
    beginning_of,
    opened,
    pieces,
    text_schema,
)
from airflow_provider_raylm.cluster.batch.fragments import Contents, File, Reading

# A cell, or a line, is never longer: pyarrow's reader parses as much at a time.
_BLOCK_BYTES = 1 << 23
_READ_CHARACTERS = 1 << 20
# Excel's own line before the header.
_TOLD_DELIMITER = re.compile(r'("?)sep=([\t !#-~])\1(?:\r\n?|\n|\Z)', re.IGNORECASE)


@dataclass(frozen=True)
class _Head:
    """What the lines before the first row tell.

    Attributes:
        names: of the columns; those at the end that have none are left out.
        delimiter: between cells.
        lines: before the header, to read over.
    """

    names: list[str]
    delimiter: str
    lines: int


def inspect_csv(file: File, how: Reading) -> Contents:
    """Return the columns of a header, and of a small file how many rows there are."""
    begin, whole = beginning(file)
    names = _head(begin, whole, file, how).names
    schema = text_schema(names)
    rows = None
    # The caller refuses two columns of one name.
    if whole and len(set(names)) == len(names):
        rows = sum(table.num_rows for table in _parsed(iter([begin]), file, how, schema)) if names else 0
    return Contents(schema, rows)


def read_csv(file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield rows, as text."""
    with opened(file) as stream:
        yield from _parsed(pieces(stream), file, how, schema)


def _head(begin: bytes, whole: bool, file: File, how: Reading) -> _Head:
    # A header may end within the bytes, and a character at their end may not.
    text = begin.decode(how.encoding, "strict" if whole else "ignore").removeprefix(MARK)
    told = _TOLD_DELIMITER.match(text)
    if how.delimiter or told is None:
        delimiter = how.delimiter or ("\t" if ".tsv" in file.uri.lower().rpartition("/")[2] else ",")
    else:
        delimiter = told[2]
    text = text[told.end() :] if told else text
    if how.escape:
        text = "".join(_doubled(io.StringIO(text), delimiter, how.escape))
    # As pyarrow does, blank lines are read over.
    names: list[str] = next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), [])
    named = max((number for number, name in enumerate(names, 1) if name), default=len(names))
    return _Head(names[:named], delimiter, 1 if told else 0)


def _parsed(every: Iterator[bytes], file: File, how: Reading, schema: pa.Schema) -> Iterator[pa.Table]:
    begin, whole = beginning_of(every)
    head = _head(begin, whole, file, how)
    encoding = how.encoding
    every = chain([begin], every)
    if how.escape:
        text = as_text(every, how, newline="")
        encoding, every = "utf-8", map(str.encode, _doubled(text, head.delimiter, how.escape))
    wanted = [head.names.index(name) for name in schema.names if name in head.names]
    position = 0
    with _opened(io.BufferedReader(Joined(every)), head, encoding) as reader:
        for batch in reader:
            _require_unnamed_empty(batch, len(head.names), position)
            position += batch.num_rows
            yield pa.Table.from_batches([batch.select(wanted)])


def _opened(stream: Any, head: _Head, encoding: str) -> csv_reader.CSVStreamingReader:
    reading = csv_reader.ReadOptions(
        block_size=_BLOCK_BYTES, encoding=encoding, use_threads=False, skip_rows=head.lines
    )
    parsing = csv_reader.ParseOptions(delimiter=head.delimiter, newlines_in_values=True)
    texts = dict.fromkeys([*head.names, ""], pa.string())
    return csv_reader.open_csv(
        stream, reading, parsing, csv_reader.ConvertOptions(column_types=texts, strings_can_be_null=False)
    )


def _require_unnamed_empty(batch: pa.RecordBatch, named: int, position: int) -> None:
    """Refuse a value in one of the columns at the end that have no name, which Excel leaves there."""
    for number in range(named, batch.num_columns):
        rows = pc.indices_nonzero(pc.binary_length(batch.column(number)))
        if len(rows):
            raise ValueError(
                f"column {number + 1} has no name, but a value in row {position + rows[0].as_py() + 1}. Give it a "
                "name in the first line, or empty it."
            )


# --- quotes that are escaped ---


def _doubled(stream: IO[str], delimiter: str, escape: str) -> Iterator[str]:
    """Yield CSV in which quotes within quotes are doubled, of one in which they are escaped.

    That is all that *escape* means, as for Spark. Arrow's own option takes it away from any other character, too.
    """
    border, escape = re.escape(delimiter), re.escape(escape)
    cell = re.compile(rf'[{border}\r\n]"((?:[^"{escape}]++|{escape}.|"")*+)(?:"|{escape}?\Z)', re.DOTALL)
    escaped = re.compile(rf'{escape}(["{escape}])')
    wanted, last = _READ_CHARACTERS, False
    # What is given out already stays, as far as a cell may begin behind it.
    text, given = "\n", 1
    while not last:
        more = stream.read(wanted)
        text, last, wanted = text + more, not more, _READ_CHARACTERS
        out, end = [], len(text)
        for match in cell.finditer(text):
            if match.end() == end and not last:
                # It may go on. Twice as much each time: a cell is not scanned again and again.
                end, wanted = match.start() + 1, 2 * end
                break
            out += [text[given : match.start(1)], escaped.sub(_with_quotes_doubled, match[1])]
            given = match.end(1)
        yield "".join([*out, text[given:end]])
        text, given = text[end - 1 :], 1


def _with_quotes_doubled(pair: re.Match[str]) -> str:
    return '""' if pair[1] == '"' else pair[1]
