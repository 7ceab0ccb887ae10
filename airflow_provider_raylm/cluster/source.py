"""From a source in a spec to rows with stable ids: which files, which rows of each, in blocks.

A row's id is its file's number in the sorted list and its position in the file, so that two tasks over one source give
a row the same id, and sorting by id restores the input's order. An id that an earlier task gave is kept.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import has_magic, url_to_fs

from airflow_provider_raylm.cluster.rows import missing_columns
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import RESERVED_PREFIX, BatchSpec

ROW_ID = f"{RESERVED_PREFIX}row_id"


_ROWS_TO_LOOK_AT = 1000


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Attributes:
        number: its place in the sorted list of the task's files.
        uri: address that fsspec opens.
        format: parquet, jsonl, csv or text.
        size: bytes.
        version: changes when the file's content does (fsspec's ``ukey``).
    """

    number: int
    uri: str
    format: str
    size: int
    version: str


def list_files(spec: BatchSpec) -> list[SourceFile]:
    """Return the files that the spec's source names, sorted; hidden ones (``_``, ``.``) are left out.

    Raises:
        BatchError: a file, folder or glob that matches nothing, or a suffix that tells no format.
    """
    found: dict[str, tuple[int, str]] = {}
    for source in spec.sources:
        fs, path = _filesystem(source)
        matches = _matches(fs, path, spec)
        if not matches:
            raise BatchError(f"source {source!r} matches no file. Check the path and the pattern.")
        for match in matches:
            found[fs.unstrip_protocol(match)] = (int(fs.size(match) or 0), str(fs.ukey(match)))
    return [
        SourceFile(number, uri, spec.format_of(uri), size, version)
        for number, (uri, (size, version)) in enumerate(sorted(found.items()))
    ]


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        fs, path = url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise BatchError(f"cannot open {uri!r}: {error}") from error
    return fs, path


def _matches(fs: Any, path: str, spec: BatchSpec) -> list[str]:
    if fs.isfile(path):
        return [path]
    if has_magic(path):
        found = [match for match in fs.glob(path) if fs.isfile(match)]
        path = "/".join(itertools.takewhile(lambda part: not has_magic(part), path.split("/")))
    else:
        found = fs.find(path) if fs.isdir(path) else []
    below = [(match, match.removeprefix(path).strip("/")) for match in found]
    return [match for match, name in below if not any(map(_hidden, name.split("/")))]


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def schema_of(file: SourceFile) -> list[str]:
    """Return the file's column names, of this provider's own only the row id.

    For a file without rows they are those that its format can tell.
    """
    if file.format == "parquet":
        with _Reading(file), fsspec.open(file.uri, "rb") as stream:
            names = list(pq.read_schema(stream).names)
    elif file.format == "jsonl":
        with _Reading(file):
            names = _jsonl_schema(file).names
    else:
        first = next(_tables(file, None, 1), None)
        names = list(first.column_names) if first is not None else []
    return [name for name in names if name == ROW_ID or not name.startswith(RESERVED_PREFIX)]


def count_rows(files: Iterable[SourceFile]) -> int | None:
    """Return the number of rows if the files tell it without being read (parquet), else None."""
    total = 0
    for file in files:
        if file.format != "parquet":
            return None
        with _Reading(file), fsspec.open(file.uri, "rb") as stream:
            total += pq.read_metadata(stream).num_rows
    return total


def check_columns(spec: BatchSpec, available: list[str]) -> None:
    """Check every column that the spec names against the source's.

    Raises:
        BatchError: a column is missing, or an output column would overwrite one of the source.
    """
    own = [name for name in available if name != ROW_ID]
    named = {*(spec.columns or ()), *([spec.id_column] if spec.id_column else [])}
    missing = sorted(named - {*own, ROW_ID})
    if spec.preprocess is None:
        missing += missing_columns(spec.all_steps, own)
    if missing:
        raise BatchError(f"the source has no column {', '.join(map(repr, missing))}; it has {', '.join(own)}")
    kept = set(spec.columns if spec.columns is not None else available)
    taken = [step.output_column for step in spec.all_steps if step.output_column in kept]
    if taken:
        raise BatchError(
            f"output_column {taken[0]!r} is a column of the source, which is never overwritten. Choose another "
            "output_column, or leave that column out with columns=."
        )


def check_ids(files: list[SourceFile], spec: BatchSpec) -> None:
    """Check that ids are unique if any come from a column, before any row is asked and paid for.

    Raises:
        BatchError: two rows share an id; the text names one.
    """
    column = spec.id_column or (ROW_ID if any(ROW_ID in schema_of(file) for file in files) else None)
    if column is None:
        return
    chunks = [
        chunk
        for file in files
        for table in read_rows(file, [column], spec.id_column, spec.block_rows)
        for chunk in table[ROW_ID].chunks
    ]
    counts = pc.value_counts(pa.chunked_array(chunks, pa.string()))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise BatchError(
            f"{len(twice)} ids of the column {column!r} stand on several rows, {twice[0]['values'].as_py()!r} for one. "
            "Ids must be unique: read each row once, or name another id_column. (Outputs of two tasks over one source "
            "carry the same ids.)"
        )


def columns_to_read(spec: BatchSpec, available: list[str]) -> list[str] | None:
    """Return the columns a task needs from its files; None for all (a row function may look at any)."""
    if spec.columns is None or spec.preprocess is not None or spec.postprocess is not None:
        return None
    used = {name for step in spec.all_steps for name in step.columns_used}
    needed = set(spec.columns) | used | {spec.id_column or ROW_ID}
    return [name for name in available if name in needed]


def read_blocks(
    files: Iterable[SourceFile], columns: list[str] | None, id_column: str | None, block_rows: int, done: pa.Array
) -> Iterator[pa.Table]:
    """Yield the rows of the files in order, in blocks of at most *block_rows*; small files share a block.

    Args:
        files: what to read.
        columns: columns to read; None for all.
        id_column: column with a row's id.
        block_rows: rows per block. The last block of a schema is smaller.
        done: ids to leave out, because an earlier attempt wrote them.

    Raises:
        BatchError: a file cannot be read, or its id column has a null; the text names the file.
    """
    held: list[pa.Table] = []
    rows = 0
    there = set(done.to_pylist())
    for file in files:
        for table in read_rows(file, columns, id_column, block_rows):
            if there:
                table = table.filter(pa.array([one not in there for one in table[ROW_ID].to_pylist()], pa.bool_()))
            if held and (not table.schema.equals(held[0].schema) or rows + table.num_rows > block_rows):
                yield pa.concat_tables(held)
                held, rows = [], 0
            if table.num_rows:
                held.append(table)
                rows += table.num_rows
    if held:
        yield pa.concat_tables(held)


def read_rows(
    file: SourceFile, columns: list[str] | None, id_column: str | None, block_rows: int
) -> Iterator[pa.Table]:
    """Yield the file's rows with their ids; other columns of this provider are left out.

    Raises:
        BatchError: the file cannot be read, or its id column has a null; the text names the file.
    """
    position = 0
    for table in _tables(file, columns, block_rows):
        ids = _ids(file, table, id_column, position)
        position += table.num_rows
        keep = [name for name in table.column_names if not name.startswith(RESERVED_PREFIX)]
        yield table.select(keep).append_column(ROW_ID, ids)


def _ids(file: SourceFile, table: pa.Table, id_column: str | None, position: int) -> pa.ChunkedArray:
    source = id_column or (ROW_ID if ROW_ID in table.column_names else None)
    if source is None:
        return pa.chunked_array([[f"{file.number:05d}-{position + i:09d}" for i in range(table.num_rows)]], pa.string())
    if source not in table.column_names:
        raise BatchError(f"{file.uri}: no column {source!r}, which id_column names; it has {table.column_names}")
    if table[source].null_count:
        raise BatchError(f"{file.uri}: the id column {source!r} is null in {table[source].null_count} rows")
    return table[source].cast(pa.string())


def _tables(file: SourceFile, columns: list[str] | None, block_rows: int) -> Iterator[pa.Table]:
    readers = {"parquet": _parquet, "jsonl": _jsonl, "csv": _csv, "text": _text}
    with _Reading(file):
        for table in readers[file.format](file, block_rows, columns):
            if columns is not None:
                table = table.select([name for name in columns if name in table.column_names])
            yield table


class _Reading:
    """Names the file in whatever goes wrong while it is read."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # OSError: the storage; ArrowException: the format; ValueError: JSON and UTF-8.
        if isinstance(error, OSError | pa.ArrowException | ValueError) and not isinstance(error, BatchError):
            raise BatchError(f"cannot read {self._file.uri} as {self._file.format}: {error}") from error


def _parquet(file: SourceFile, block_rows: int, columns: list[str] | None) -> Iterator[pa.Table]:
    with fsspec.open(file.uri, "rb") as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=block_rows, columns=columns):
            yield pa.Table.from_batches([batch])


def _csv(file: SourceFile, block_rows: int, columns: list[str] | None) -> Iterator[pa.Table]:
    """Read every column as text: a type guessed from the first rows fails, or changes, at a later one."""
    with fsspec.open(file.uri, "rt", compression="infer", newline="", encoding="utf-8") as stream:
        reader = csv.reader(stream, strict=True)
        names = next(reader, None)
        if names is None:
            return
        for number, chunk in _chunks(reader, block_rows):
            for offset, row in enumerate(chunk):
                if len(row) != len(names):
                    raise ValueError(f"row {number + offset + 1} has {len(row)} fields, the header {len(names)}")
            columns_of_cells = zip(*chunk, strict=True)
            yield pa.table([pa.array(cells, pa.string()) for cells in columns_of_cells], names=names)


def _jsonl(file: SourceFile, block_rows: int, columns: list[str] | None) -> Iterator[pa.Table]:
    schema = _jsonl_schema(file)
    texts = {field.name for field in schema if pa.types.is_string(field.type)}
    for rows in _json_objects(file, block_rows):
        cells = [{name: as_text(value) if name in texts else value for name, value in row.items()} for row in rows]
        yield pa.Table.from_pylist(cells, schema)


@functools.lru_cache(maxsize=1024)
def _jsonl_schema(file: SourceFile) -> pa.Schema:
    """Return each column with the one type that holds all its values in the file, else as text.

    Found by reading the whole file, because types that are found block by block differ between blocks.
    """
    types: dict[str, pa.DataType] = {}
    for rows in _json_objects(file, _ROWS_TO_LOOK_AT):
        for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
            types[name] = common_type(types.get(name, pa.null()), [row.get(name) for row in rows])
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])


def common_type(known: pa.DataType, values: list[Any]) -> pa.DataType:
    """Return the type that holds *values* and whatever *known* holds; text if there is none."""
    try:
        found = pa.array(values).type
        schemas = [pa.schema([("", kind)]) for kind in (known, found)]
        common = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowException, OverflowError):
        return pa.string()
    # No Parquet file can hold an object without a key.
    return pa.string() if "struct<>" in str(common) else common


def as_text(value: Any) -> Any:
    """Return a value for a column of text: strings and null as they are, anything else as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _json_objects(file: SourceFile, block_rows: int) -> Iterator[list[dict[str, Any]]]:
    with fsspec.open(file.uri, "rt", compression="infer", encoding="utf-8") as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        for _, chunk in _chunks(lines, block_rows):
            yield [_json_object(line, number) for number, line in chunk]


def _json_object(line: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"line {number}: expected an object, found {type(value).__name__}")
    return _written_out(value) if _HALF_A_CHARACTER.search(line) else value


# JSON can escape half of a character's surrogate pair, which stands for no text.
_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def _written_out(value: Any) -> Any:
    """Return the value with such escapes left as they are written."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_written_out(one) for one in value]
    if isinstance(value, dict):
        return {_written_out(key): _written_out(one) for key, one in value.items()}
    return value


def _text(file: SourceFile, block_rows: int, columns: list[str] | None) -> Iterator[pa.Table]:
    with fsspec.open(file.uri, "rt", compression="infer", encoding="utf-8") as stream:
        for _, chunk in _chunks(stream, block_rows):
            yield pa.table({"text": pa.array([line.rstrip("\r\n") for line in chunk], pa.string())})


def _chunks(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield (number of the first item, items) in lists of at most *size*."""
    iterator = iter(items)
    for start in itertools.count(0, size):
        chunk = list(itertools.islice(iterator, size))
        if not chunk:
            return
        yield start, chunk
