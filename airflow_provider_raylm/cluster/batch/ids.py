"""Row ids that come from a column: as text, and unique over a hundred million rows in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pandas.util import hash_array

from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, Reading
from airflow_provider_raylm.errors import BatchError

# 64 MiB of hashes; more are sorted in files, each of which holds those that are alike modulo their number.
_HELD = 8_000_000
_FILES = 64

_TEXT_CASTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_decimal,
    pa.types.is_temporal,
    pa.types.is_string_view,
)


def is_id_type(kind: pa.DataType) -> bool:
    """Return whether values of this type can be ids."""
    kind = _value_type(kind)
    return is_bytes(kind) or any(is_it(kind) for is_it in _TEXT_CASTS)


def id_name(schema: pa.Schema, how: Reading) -> str | None:
    """Return the column of a file that has its rows' ids, or None."""
    return how.id_column or (ROW_ID if ROW_ID in schema.names else None)


def require_id_type(uri: str, schema: pa.Schema, name: str) -> None:
    """Refuse a column that cannot give ids.

    Raises:
        BatchError: it is not there, or of another type; the message names the file.
    """
    if name not in schema.names:
        raise BatchError(f"{uri}: no column {name!r}, which id_column names; it has {', '.join(schema.names)}")
    kind = schema.field(name).type
    if not is_id_type(kind) and not pa.types.is_null(kind):
        raise BatchError(
            f"{uri}: the column {name!r} is of type {kind}, which cannot be an id; choose another id_column"
        )


def id_texts(uri: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's values as ids: bytes, such as a UUID's, as hexadecimal digits.

    Raises:
        BatchError: the column has nulls, or text that is none; the message names the file.
    """
    if column.null_count:
        raise BatchError(f"{uri}: the id column {name!r} is null in {column.null_count} rows")
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_bytes(column.type):
        return pa.chunked_array([[value.hex() for value in column.to_pylist()]], pa.string())
    texts = column.cast(pa.string())
    texts.validate(full=True)
    return texts


def hashes(ids: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Return a 64-bit hash of each id."""
    chunks = (chunk for chunk in ids.chunks if len(chunk))
    return _joined([hash_array(chunk.to_numpy(zero_copy_only=False), categorize=False) for chunk in chunks])


def _value_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether values of this type are bytes, of any length."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


class Seen:
    """The hashes of ids seen so far: in memory while they are few, else in files, until it is closed.

    Args:
        held: how many at most are held in memory.
    """

    def __init__(self, held: int = _HELD) -> None:
        self._most = held
        self._held: list[np.ndarray[Any, Any]] = []
        self._count = 0
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, found: np.ndarray[Any, Any]) -> None:
        """Add the hashes of some ids."""
        self._held.append(found)
        self._count += len(found)
        if self._count > self._most:
            self._spill()

    def repeated(self) -> set[int]:
        """Return the hashes that were added more than once."""
        if self._folder is not None:
            self._spill()
        twice: set[int] = set()
        for part in self._parts():
            part.sort()
            twice.update(part[1:][part[1:] == part[:-1]].tolist())
        return twice

    def _spill(self) -> None:
        self._folder = self._folder or TemporaryDirectory(prefix="raylm-ids-")
        every = _joined(self._held)
        for number in range(_FILES):
            with (Path(self._folder.name) / str(number)).open("ab") as file:
                file.write(every[every % _FILES == number].tobytes())
        self._held, self._count = [], 0

    def _parts(self) -> Iterator[np.ndarray[Any, Any]]:
        if self._folder is None:
            yield _joined(self._held)
        else:
            for number in range(_FILES):
                yield np.fromfile(Path(self._folder.name) / str(number), np.uint64)


def _joined(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def find_repeated(twice: set[int], ids: Iterable[pa.ChunkedArray]) -> str | None:
    """Return an id that really stands twice among *ids*, of those whose hash is in *twice*; two ids may share one."""
    seen: set[str] = set()
    suspects = np.array(sorted(twice), np.uint64)
    for chunk in ids:
        for text in chunk.filter(pa.array(np.isin(hashes(chunk), suspects))).to_pylist():
            if text in seen:
                return str(text)
            seen.add(text)
    return None
