"""The plan's blocks as tables of rows: each file opened once, and of it only what is still wanted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.columns import cast
from airflow_provider_raylm.cluster.batch.formats import tables
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, Fragment
from airflow_provider_raylm.cluster.batch.ids import id_texts
from airflow_provider_raylm.cluster.batch.plan import Block, Plan
from airflow_provider_raylm.cluster.batch.storage import reading
from airflow_provider_raylm.errors import BatchError

Wanted = Callable[[str], bool]


def read_blocks(plan: Plan, is_wanted: Wanted) -> Iterator[tuple[str, pa.Table]]:
    """Yield (name, rows) of the plan's blocks that are wanted, in order; rows have the plan's columns and their ids.

    Args:
        plan: what to read.
        is_wanted: takes a block's name.

    Raises:
        BatchError: a file cannot be read; the text names it.
    """
    for fragments, blocks in itertools.groupby(plan.blocks(), key=lambda block: block.fragments):
        if len(fragments) > 1:
            (block,) = blocks
            if is_wanted(name := plan.name(fragments[0], 0)):
                pieces = [_whole(plan, plan.fragments[number]) for number in fragments]
                yield name, _exactly(pa.concat_tables(pieces), block, plan)
        else:
            yield from _of_one(plan, plan.fragments[fragments[0]], blocks, is_wanted)


def _of_one(
    plan: Plan, fragment: Fragment, blocks: Iterator[Block], is_wanted: Wanted
) -> Iterator[tuple[str, pa.Table]]:
    with closing(_Cursor(plan, fragment)) as cursor:
        for block in blocks:
            if block.rows is None:
                # Only reading tells how many there are: up to the end, and what is not wanted is read over.
                for first in itertools.count(block.first, plan.block_rows):
                    rows = cursor.rows(first, plan.block_rows)
                    if rows.num_rows and is_wanted(name := plan.name(fragment.number, first)):
                        yield name, rows
                    if rows.num_rows < plan.block_rows:
                        return
            elif is_wanted(name := plan.name(fragment.number, block.first)):
                yield name, _exactly(cursor.rows(block.first, block.rows), block, plan)


def _whole(plan: Plan, fragment: Fragment) -> pa.Table:
    with closing(_Cursor(plan, fragment)) as cursor:
        return cursor.rows(0, None)


def _exactly(rows: pa.Table, block: Block, plan: Plan) -> pa.Table:
    if rows.num_rows != block.rows:
        uri = plan.fragments[block.fragments[0]].file.uri
        raise BatchError(f"{uri} has changed since the task began: {rows.num_rows} of {block.rows} rows of a block")
    return rows


class _Cursor:
    """Reads on in one file, which is opened with the first row that is wanted of it."""

    def __init__(self, plan: Plan, fragment: Fragment) -> None:
        self._plan = plan
        self._fragment = fragment
        self._id = (plan.how.id_column or ROW_ID) if fragment.has_ids else None
        self._told = dict(fragment.partition)
        wanted = [field for field in plan.schema if field.name not in self._told]
        if self._id is not None and self._id not in plan.schema.names:
            wanted.append(pa.field(self._id, pa.string()))
        self._first = 0
        self._tables = tables(fragment.file, plan.how, pa.schema(wanted), lambda: self._first)
        self._position = 0
        self._held: pa.Table | None = None

    def close(self) -> None:
        """Close the file. It asks here how far it is, so that only the next collection of garbage would do so."""
        self._tables.close()
        self._held = None

    def rows(self, first: int, rows: int | None) -> pa.Table:
        """Return *rows* rows from position *first* on, which is never before what was taken; None for all."""
        self._first = first
        end = None if rows is None else first + rows
        with reading(self._fragment.file.uri, self._fragment.file.format):
            taken: list[pa.Table] = []
            while (end is None or self._first < end) and (table := self._table()) is not None:
                offset = self._first - self._position
                part = table.slice(offset, None if end is None else end - self._first)
                taken.append(self._conform(part, self._first))
                self._first += part.num_rows
            return pa.concat_tables(taken) if taken else self._conform(None, first)

    def _table(self) -> pa.Table | None:
        """Return the table that has the first row that is wanted, or None past the end."""
        while self._held is None or self._position + self._held.num_rows <= self._first:
            found = next(self._tables, None)
            if found is None:
                return None
            self._position, self._held = found
        return self._held

    def _conform(self, table: pa.Table | None, first: int) -> pa.Table:
        """Return rows with the plan's columns, of the plan's types, and with their ids."""
        count = 0 if table is None else table.num_rows
        columns: list[Any] = []
        for field in self._plan.schema:
            if table is not None and field.name in table.column_names:
                column = table[field.name]
                columns.append(column if column.type.equals(field.type) else cast(column, field))
            elif self._told.get(field.name) is not None:
                columns.append(pa.repeat(pa.scalar(self._told[field.name], pa.string()), count).cast(field.type))
            else:
                columns.append(pa.nulls(count, field.type))
        if self._id is not None and table is not None:
            ids = id_texts(self._fragment.file.uri, self._id, table[self._id])
        else:
            ids = self._plan.names(self._fragment.number, first, count)
        return pa.Table.from_arrays([*columns, ids], schema=self._plan.schema.append(pa.field(ROW_ID, pa.string())))
