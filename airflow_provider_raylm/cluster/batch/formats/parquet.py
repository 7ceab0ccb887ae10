"""Parquet: a file's footer tells its columns and rows, and its row groups are read one after the other."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_provider_raylm.cluster.batch.fragments import Contents, File, Reading
from airflow_provider_raylm.cluster.batch.ids import hashes, id_name, id_texts, require_id_type
from airflow_provider_raylm.cluster.batch.storage import Place

# A footer of a few hundred columns and row groups; many a small file as a whole.
_ENDS_BYTES = 1 << 16
_ROWS = 1024
# Of a row group, decoded at a time: what is read ahead of the blocks is not more, however wide rows are.
_BATCH_BYTES = 1 << 24


def inspect(file: File, how: Reading) -> Contents:
    """Return what is in a file, by its last bytes; the ids of a column, where these are the whole file."""
    if not file.size:
        raise ValueError("it has no bytes. Did what writes it fail?")
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
        require_id_type(file.uri, schema, name)
        column = pq.read_table(io.BytesIO(end), columns=[name])[name]
        ids = hashes(id_texts(file.uri, name, column))
    return Contents(schema, metadata.num_rows, ids)


def read(file: File, schema: pa.Schema, wanted_from: Callable[[], int]) -> Iterator[tuple[int, pa.Table]]:
    """Yield position and rows; those of row groups that end before *wanted_from* are not read."""
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


def extremes(file: File, field: pa.Field) -> pa.ChunkedArray | None:
    """Return the least and the greatest values of a column's row groups, where the footer tells them as integers."""
    if not (pa.types.is_int64(field.type) or pa.types.is_timestamp(field.type) or pa.types.is_duration(field.type)):
        return None
    with Place(file.uri).open() as stream:
        metadata = pq.ParquetFile(stream).metadata
    found: list[int] = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema != field.name or not column.num_values:
                continue
            told = column.statistics
            if told is None or not told.has_min_max or column.physical_type != "INT64":
                return None
            found += [told.min_raw, told.max_raw]
    return pa.chunked_array([pa.array(found, pa.int64()).view(field.type)])


def _batch_rows(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """Return how many rows of a row group are read at a time."""
    chunks = (group.column(number) for number in range(group.num_columns))
    nbytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names)
    return int(max(1, min(_ROWS, _BATCH_BYTES * group.num_rows // max(nbytes, 1))))
