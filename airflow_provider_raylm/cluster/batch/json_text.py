"""JSON as it is written: an object or a mixed column is each row's own text, a number keeps its digits.

Arrow's JSON reader makes one struct type of all objects of a column, so that a row gets the others' keys as nulls, 5
beside 2.5 becomes 5.0, and time and size grow with the square of the keys. So values are read by Python's parser here,
and only columns whose values are alike in all rows become anything but text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from json.decoder import scanstring  # type: ignore[attr-defined]  # json's own, without a stub
from typing import IO, Any

import pyarrow as pa

_READ_CHARACTERS = 1 << 20
_BLANKS = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")
# JSON can escape half of a character's surrogate pair, which stands for no text.
_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_INT64 = 2**63

Object = dict[str, Any]


class _Number(float):
    """A number with a fraction or an exponent, and how it is written."""

    text: str

    def __new__(cls, text: str) -> _Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


_DECODER = json.JSONDecoder(parse_float=_Number)


def elements(stream: IO[str]) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of each JSON value of a file: its lines, or the elements of one array.

    Arrays may follow each other, as on the lines of a file.

    Raises:
        ValueError: an array is broken or cut off, or something else follows it.
    """
    head = ""
    while not head.strip() and (more := stream.read(_READ_CHARACTERS)):
        head += more
    if head.lstrip().startswith("["):
        yield from _of_array(head.lstrip()[1:], stream)
        return
    for number, line in enumerate(_lines(head, stream), 1):
        if line.strip():
            yield f"line {number}", line


def _lines(head: str, stream: IO[str]) -> Iterator[str]:
    *whole, last = head.split("\n")
    yield from whole
    yield last + stream.readline()
    yield from stream


def _of_array(text: str, stream: IO[str]) -> Iterator[tuple[str, str]]:
    number, at, wanted = 1, 0, _READ_CHARACTERS
    while True:
        at = _past(_BETWEEN, text, at)
        if text.startswith("]", at):
            text, at = _next_array(text[at + 1 :], stream, number), 0
            if not text:
                return
            continue
        problem = f"element {number}: the array is not closed"
        try:
            _, end = _DECODER.raw_decode(text, at)
            # A number at the end of what was read may continue.
            complete = end < len(text)
        except (ValueError, RecursionError) as error:
            complete, problem = False, f"element {number}: {error}"
        if complete:
            yield f"element {number}", text[at:end]
            number, at, wanted = number + 1, end, _READ_CHARACTERS
            continue
        more = stream.read(wanted)
        if not more:
            raise ValueError(problem)
        # Twice as much each time: an element is not scanned again and again.
        text, at, wanted = text[at:] + more, 0, wanted * 2


def _next_array(text: str, stream: IO[str], number: int) -> str:
    """Return what was read of the array that follows one, without its bracket; nothing at the end of the file."""
    while not text.strip() and (more := stream.read(_READ_CHARACTERS)):
        text = more
    text = text.lstrip()
    if text and not text.startswith("["):
        raise ValueError(f"element {number}: what follows the array is none")
    return text[1:]


def _past(blanks: re.Pattern[str], text: str, at: int) -> int:
    """Return the position behind the blanks that begin at *at*, if any do."""
    match = blanks.match(text, at)
    return match.end() if match else at


def parse(where: str, text: str) -> Object:
    """Return a JSON object; numbers with a fraction know how they are written.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
    return _written_out(value) if _HALF_A_CHARACTER.search(text) else value


def _written_out(value: Any) -> Any:
    """Return the value with escapes of half a character left as they are written."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_written_out(one) for one in value]
    if isinstance(value, dict):
        return {_written_out(key): _written_out(one) for key, one in value.items()}
    return value


def kinds(objects: Iterable[Object], known: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
    """Return, by column, the type of all its values in *objects* and of those seen before."""
    for one in objects:
        for name, value in one.items():
            before = known.get(name)
            if before is None or not pa.types.is_string(before):
                known[name] = common(before or pa.null(), _kind(value))
    return known


def _kind(value: Any) -> pa.DataType:
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if -_INT64 <= value < _INT64 else pa.string()
    if isinstance(value, _Number):
        return pa.float64() if repr(float(value)) == value.text else pa.string()
    if isinstance(value, float):  # NaN and infinities
        return pa.float64()
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        elements = reduce(common, map(_kind, value), pa.null())
        mixed = pa.types.is_string(elements) and not all(one is None or isinstance(one, str) for one in value)
        return pa.string() if mixed else pa.list_(elements)
    return pa.string()


def common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type of a column with values of two types: text, unless they are the same."""
    if pa.types.is_null(one) or one.equals(other):
        return other
    if pa.types.is_null(other):
        return one
    if pa.types.is_list(one) and pa.types.is_list(other):
        elements = [kind.value_type for kind in (one, other)]
        known = [kind for kind in elements if not pa.types.is_null(kind)]
        if len(known) < 2:
            return pa.list_(known[0] if known else pa.null())
    return pa.string()


def column_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column of which *kind* is known: text where no value says anything."""
    if pa.types.is_null(kind):
        return pa.string()
    return pa.list_(pa.string()) if pa.types.is_list(kind) and pa.types.is_null(kind.value_type) else kind


def table(rows: list[tuple[str, Object]], schema: pa.Schema) -> pa.Table:
    """Return rows, each with the text it was parsed from, as a table of *schema*'s columns."""
    columns = []
    for field in schema:
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            values = [_text(row.get(field.name), field.name, text) for text, row in rows]
        else:
            values = [row.get(field.name) for _, row in rows]
        columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema) if columns else pa.table({"": pa.nulls(len(rows))}).select([])


def _text(value: Any, name: str, row: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, _Number):
        return value.text
    # The one integer that is written in two ways.
    if isinstance(value, list | dict) or (value == 0 and "-0" in row):
        return _written(name, row)
    return json.dumps(value)


def _written(name: str, row: str) -> str:
    """Return a member's value as it is written in the text of its object, which has been parsed before."""
    at = _past(_BLANKS, row, row.index("{") + 1)
    found = ""
    while row[at] != "}":
        key, at = scanstring(row, at + 1)
        at = _past(_BLANKS, row, row.index(":", at) + 1)
        _, end = _DECODER.raw_decode(row, at)
        if _written_out(key) == name:
            found = row[at:end]
        at = _past(_BETWEEN, row, end)
    return found


def common_type(values: list[Any]) -> pa.DataType:
    """Return the type of a column of Python values, such as row functions make; text if no other holds them all."""
    try:
        found = pa.array(values).type
    except (pa.ArrowException, OverflowError):
        return pa.string()
    # No Parquet file can hold an object without a key.
    return pa.string() if "struct<>" in str(found) else found


def as_text(value: Any) -> Any:
    """Return a value for a column of text: strings and null as they are, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
