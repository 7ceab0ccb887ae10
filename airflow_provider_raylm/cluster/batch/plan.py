"""The one plan of a task: every file looked at once, side by side; all checks made; the rows cut into blocks.

A block is a range of rows of one fragment (a file), or several small fragments whole. Where it begins names it and its
part files: what is done is a set of names, and what is left is the plan without them. Nothing here grows with rows.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from airflow_provider_raylm.cluster.batch.columns import check_columns, check_ids, check_values, one_schema
from airflow_provider_raylm.cluster.batch.formats import inspect, tables
from airflow_provider_raylm.cluster.batch.fragments import Fragment, Reading
from airflow_provider_raylm.cluster.batch.ids import Seen, id_name
from airflow_provider_raylm.cluster.batch.source import Say, list_files, partition_of
from airflow_provider_raylm.cluster.batch.storage import REQUESTS_AT_A_TIME
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchSpec
from airflow_provider_raylm.specs.batch import CSV_OPTIONS, Format


@dataclass(frozen=True)
class Block:
    """Rows that are sent, answered and written together.

    Attributes:
        fragments: numbers of one fragment, or of several that are read whole.
        first: position of its first row in the first fragment.
        rows: how many; None for all that the fragment has from there on, in as many blocks as that makes.
    """

    fragments: tuple[int, ...]
    first: int
    rows: int | None


@dataclass(frozen=True)
class Plan:
    """What a task reads.

    Attributes:
        fragments: all files, in order.
        schema: the columns that the task needs, as every row has them.
        how: how files are read.
        block_rows: rows per block.
        limit: rows in all, at most.
    """

    fragments: Sequence[Fragment]
    schema: pa.Schema
    how: Reading
    block_rows: int
    limit: int | None = None

    @property
    def rows(self) -> int | None:
        """Rows in all, or None when only reading tells."""
        counts = [fragment.rows for fragment in self.fragments]
        known = sum(count for count in counts if count is not None)
        if self.limit is not None and known >= self.limit:
            return self.limit
        return None if None in counts else known

    def name(self, fragment: int, row: int) -> str:
        """Return the name of a row by its position: its id, and the name of the block that begins there.

        Sorting names restores the input's order.
        """
        return f"{self._prefix(fragment)}{row:09d}"

    def names(self, fragment: int, first: int, rows: int) -> pa.Array:
        """Return the names of *rows* rows from the position *first* on."""
        numbers = pa.array(range(first, first + rows), pa.int64()).cast(pa.string())
        return pc.binary_join_element_wise(self._prefix(fragment), pc.utf8_lpad(numbers, 9, "0"), "")

    def _prefix(self, fragment: int) -> str:
        width = max(5, len(str(len(self.fragments) - 1)))
        return f"{fragment:0{width}d}-"

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks, in order."""
        left = self.limit if self.limit is not None else float("inf")
        small: list[Fragment] = []
        held = 0
        for fragment in self.fragments:
            if left <= 0:
                break
            is_small = fragment.rows is not None and fragment.rows < self.block_rows and fragment.rows <= left
            if small and (not is_small or held + (fragment.rows or 0) > self.block_rows):
                yield _together(small)
                small, held = [], 0
            if fragment.rows is None:
                yield Block((fragment.number,), 0, None)
            elif is_small:
                small += [fragment] if fragment.rows else []
                held += fragment.rows
                left -= fragment.rows
            else:
                rows = int(min(fragment.rows, left))
                left -= rows
                for first in range(0, rows, self.block_rows):
                    yield Block((fragment.number,), first, min(self.block_rows, rows - first))
        if small:
            yield _together(small)


def _together(fragments: list[Fragment]) -> Block:
    numbers = tuple(fragment.number for fragment in fragments)
    return Block(numbers, 0, sum(fragment.rows or 0 for fragment in fragments))


def make_plan(spec: BatchSpec, say: Say) -> Plan:
    """List the source, look at each file, check all that can be checked, and return the plan.

    Raises:
        BatchError: a source matches nothing or holds the task's own output; a file cannot be read; a column is missing,
            there twice or in the way of an answer, or of two types; ids are not unique.
    """
    how = Reading(spec.source_format, spec.delimiter, spec.escape, spec.encoding, spec.id_column)
    files = list_files(spec, how, say)
    _require_use(spec, {file.format for file in files})
    with ThreadPoolExecutor(REQUESTS_AT_A_TIME, thread_name_prefix="raylm-look") as pool, Seen() as seen:
        contents = []
        # Thousands of files have few schemas.
        schemas: dict[pa.Schema, pa.Schema] = {}
        for found in pool.map(lambda file: inspect(file, how), files):
            if found.ids is not None:
                seen.add(found.ids)
            contents.append(replace(found, schema=schemas.setdefault(found.schema, found.schema), ids=None))
        twice = seen.repeated()
    fragments = [
        Fragment(number, file, found.rows, partition_of(file.uri, found.schema), id_name(found.schema, how) is not None)
        for number, (file, found) in enumerate(zip(files, contents, strict=True))
    ]
    schema = one_schema(spec, fragments, contents)
    check_columns(spec, fragments, contents, schema)
    check_values(how, fragments, contents, schema)
    check_ids(spec, how, fragments, contents, twice)
    plan = Plan(fragments, schema, how, spec.block_rows, spec.limit)
    return replace(plan, fragments=_counted(plan)) if spec.limit is not None else plan


def _require_use(spec: BatchSpec, formats: set[Format]) -> None:
    """Refuse options of reading that no file is read by."""
    for name in CSV_OPTIONS:
        if getattr(spec, name) is not None and "csv" not in formats:
            raise BatchError(f"{name}: none of the source's files is CSV. Leave it out.")
    if formats == {"parquet"} and codecs.lookup(spec.encoding).name != "utf-8":
        raise BatchError("encoding: all of the source's files are Parquet, which tells its own. Leave it out.")


def _counted(plan: Plan) -> Sequence[Fragment]:
    """Return the fragments with the rows counted that the limit needs; a trial reads few."""
    left = plan.limit or 0
    counted = []
    for fragment in plan.fragments:
        rows = fragment.rows
        if rows is None and left > 0:
            rows = 0
            for _, table in tables(fragment.file, plan.how, pa.schema([])):
                rows += table.num_rows
                if rows >= left:
                    break
        left -= rows or 0
        counted.append(replace(fragment, rows=rows))
    return counted
