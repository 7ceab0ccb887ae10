"""From a block of rows to answers: templates, row functions, questions, and two tables of what came of it.

Only columns that a template or a row function needs become Python values. The others pass by as Arrow, whatever is in
them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request, RowError
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.json_text import as_text, common_type
from airflow_provider_raylm.cluster.batch.loading import load
from airflow_provider_raylm.cluster.batch.loop import computed
from airflow_provider_raylm.cluster.batch.recovery import Ask
from airflow_provider_raylm.cluster.batch.rows import EngineTraits, Question, compile_step
from airflow_provider_raylm.cluster.batch.rows.values import values
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import RESERVED_PREFIX, BatchSpec

PROMPT_TOKENS = f"{RESERVED_PREFIX}prompt_tokens"
COMPLETION_TOKENS = f"{RESERVED_PREFIX}completion_tokens"
FINISH_REASON = f"{RESERVED_PREFIX}finish_reason"
REASON = f"{RESERVED_PREFIX}reason"
MESSAGE = f"{RESERVED_PREFIX}message"

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Answered:
    """What came of a block.

    Attributes:
        rows: the answered rows, as they are written.
        failed: the others, as they came.
        counts: what the engine was paid for, failed rows included: ``prompt_tokens``, ``cached_prompt_tokens``,
            ``completion_tokens``; ``cut_off`` and ``reasked`` are answers, ``truncated_prompts`` prompts.
    """

    rows: pa.Table
    failed: pa.Table
    counts: Counter[str]


@dataclass
class _Block:
    """Rows in flight: each is either still asked about or failed, and never both."""

    rows: list[dict[str, Any]]
    failed: dict[int, Refusal] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.prompt_tokens = [0] * len(self.rows)
        self.completion_tokens = [0] * len(self.rows)
        self.finish_reasons = [""] * len(self.rows)

    def count(self, i: int, answer: Answer) -> None:
        """Add what an answer took."""
        self.prompt_tokens[i] += answer.prompt_tokens
        self.completion_tokens[i] += answer.completion_tokens
        self.finish_reasons[i] = answer.finish_reason
        self.counts["prompt_tokens"] += answer.prompt_tokens
        self.counts["completion_tokens"] += answer.completion_tokens
        self.counts["cached_prompt_tokens"] += answer.cached_tokens
        self.counts["truncated_prompts"] += answer.truncated
        self.counts["cut_off"] += answer.finish_reason == "length"

    def live(self) -> list[int]:
        return [i for i in range(len(self.rows)) if i not in self.failed]

    def apply(self, change: Callable[[dict[str, Any]], Any], at_a_time: int = 1) -> dict[int, Any]:
        """Call *change* for every live row, by several threads or by this one; a RowError fails that row."""

        def changed(i: int) -> Any:
            try:
                return change(self.rows[i])
            except RowError as error:
                return error

        live = self.live()
        with ThreadPoolExecutor(at_a_time) as threads:
            outcomes = list((threads.map if at_a_time > 1 else map)(changed, live))
        self.failed |= {i: one.refusal for i, one in zip(live, outcomes, strict=True) if isinstance(one, RowError)}
        return {i: one for i, one in zip(live, outcomes, strict=True) if not isinstance(one, RowError)}


class BlockAnswerer:
    """Answers blocks for one task; holds nothing between blocks, so that they may be answered side by side.

    Args:
        spec: the task.
        engine: whom it is asked.
        ask: the way to the engine.

    Raises:
        BatchError: a row function or a schema cannot be imported, or a schema is none.
    """

    def __init__(self, spec: BatchSpec, engine: EngineTraits, ask: Ask) -> None:
        self._spec = spec
        self._ask = ask
        self._steps = [compile_step(step, engine) for step in spec.all_steps]
        self._preprocess = load_function("preprocess", spec.preprocess)
        self._postprocess = load_function("postprocess", spec.postprocess)
        waits = self._preprocess or self._postprocess or any(step.at_a_time > 1 for step in self._steps)
        self._in_thread = asyncio.to_thread if waits else computed

    async def answer(self, table: pa.Table, name: str) -> Answered:
        """Return what comes of the rows of *table*, the block of that name."""
        block = await self._in_thread(self._begin, table)
        # What later steps ask is answered best where the first one's keys and values are.
        near = name if len(self._steps) > 1 else None
        for step in self._steps:
            requests = await self._in_thread(self._render, block, step)
            for left in range(step.reasks, -1, -1):
                requests = await self._asked(block, step, requests, near, again=left > 0)
                block.counts["reasked"] += len(requests)
        return await self._in_thread(self._finish, table, block)

    async def _asked(
        self, block: _Block, step: Question, requests: dict[int, Request], near: str | None, *, again: bool
    ) -> dict[int, Request]:
        """Ask, note what came of each row, and return what is to be asked again of those whose answer is none."""
        if not requests:
            return {}
        answers = await self._ask(step.question, list(requests.values()), near)

        def read() -> dict[int, Request]:
            refused = {}
            for (i, request), answer in zip(requests.items(), answers, strict=True):
                if isinstance(answer, Refusal):
                    block.failed[i] = answer
                    continue
                block.count(i, answer)
                found = step.read(answer)
                if not isinstance(found, Refusal):
                    block.rows[i].update(found)
                elif again:
                    refused[i] = step.again(request, answer, found)
                else:
                    block.failed[i] = found
            return refused

        # Not here, where all blocks wait for their turn: a schema may take a millisecond per row.
        return await self._in_thread(read)

    def _begin(self, table: pa.Table) -> _Block:
        block = _Block(*values(table, self._columns(table)))
        self._transform(block, self._preprocess)
        return block

    def _render(self, block: _Block, step: Question) -> dict[int, Request]:
        try:
            return block.apply(step.request, step.at_a_time)
        except KeyError as error:
            present = ", ".join(block.rows[block.live()[0]])
            raise BatchError(f"preprocess: its row has no column {error}; it has {present}") from None

    def _finish(self, table: pa.Table, block: _Block) -> Answered:
        self._transform(block, self._postprocess)
        return Answered(self._answered(table, block), _failed(table, block), block.counts)

    def _columns(self, table: pa.Table) -> list[str]:
        """Return the columns that become Python values."""
        if self._preprocess is not None or self._postprocess is not None:
            return [name for name in table.column_names if name != ROW_ID]
        used = {name for step in self._spec.all_steps for name in step.columns_used}
        return [name for name in table.column_names if name in used]

    def _transform(self, block: _Block, function: RowFunction | None) -> None:
        if function is None:
            return

        def change(row: dict[str, Any]) -> dict[str, Any]:
            try:
                changed = dict(function(dict(row)))
                for value in [value for name, value in changed.items() if value is not row.get(name)]:
                    _require_storable(value)
                return changed
            except Exception as error:  # the author's own code, about this row
                raise RowError("row_function", f"{type(error).__name__}: {error}") from error

        for i, row in block.apply(change).items():
            block.rows[i] = row

    def _answered(self, table: pa.Table, block: _Block) -> pa.Table:
        live = block.live()
        kept = _rows(table, live)
        made = [column for step in self._steps for column in step.columns]
        produced = [column.name for column in made]
        if self._preprocess is None and self._postprocess is None:
            names = [name for name in table.column_names if name != ROW_ID and name not in produced]
            if self._spec.columns is not None:
                names = [name for name in names if name in self._spec.columns]
            answered = kept.select(names)
        else:
            answered = self._rebuilt(table, block, live, produced)
        for column in made:
            answered = answered.append_column(column, _made([block.rows[i].get(column.name) for i in live], column))
        return (
            answered.append_column(ROW_ID, kept[ROW_ID])
            .append_column(PROMPT_TOKENS, pa.array([block.prompt_tokens[i] for i in live], pa.int64()))
            .append_column(COMPLETION_TOKENS, pa.array([block.completion_tokens[i] for i in live], pa.int64()))
            .append_column(FINISH_REASON, pa.array([block.finish_reasons[i] for i in live], pa.string()))
        )

    def _rebuilt(self, table: pa.Table, block: _Block, live: list[int], produced: list[str]) -> pa.Table:
        """Build the columns anew, because row functions may have changed them; known ones keep their type."""
        source = [name for name in table.column_names if name != ROW_ID]
        unwanted = set(produced)
        if self._spec.columns is not None:
            unwanted |= set(source) - set(self._spec.columns)
        names = dict.fromkeys(name for i in live for name in block.rows[i] if name not in unwanted)
        columns = {}
        for name in names if live else [name for name in source if name not in unwanted]:
            values = [block.rows[i].get(name) for i in live]
            columns[name] = _column(values, table.schema.field(name).type if name in source else pa.null())
        return pa.table(columns) if columns else table.take(pa.array(live, pa.int64())).select([])


def _made(values: list[Any], column: pa.Field) -> pa.Array:
    """Return a column of answers, which a row function may have changed.

    Raises:
        BatchError: it made of them what the column cannot hold.
    """
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, OverflowError) as error:
        raise BatchError(
            f"postprocess: the column {column.name!r} holds {column.type}, and a row's value is none: {error}"
        ) from None


def _column(values: list[Any], known: pa.DataType) -> pa.Array:
    """Return the values as the type that they had before, else as one that holds them all."""
    try:
        return pa.array(values, known)
    except (pa.ArrowException, OverflowError):
        kind = common_type(values)
        return pa.array(list(map(as_text, values)) if pa.types.is_string(kind) else values, kind)


def _rows(table: pa.Table, indices: list[int]) -> pa.Table:
    """Return some rows of a table; all or none of them without copying, which is what most blocks need."""
    if len(indices) in (0, table.num_rows):
        return table.slice(0, len(indices))
    return table.take(pa.array(indices, pa.int64()))


def _failed(table: pa.Table, block: _Block) -> pa.Table:
    """Return the failed rows as they came, with id, reason and message: enough to read and to replay them."""
    indices = sorted(block.failed)
    return (
        _rows(table, indices)
        .append_column(REASON, pa.array([block.failed[i].reason for i in indices], pa.string()))
        .append_column(MESSAGE, pa.array([block.failed[i].message for i in indices], pa.string()))
    )


def _require_storable(value: Any) -> None:
    """Raise what Arrow raises of a new value that no file can hold. A map, which one has held, it could not tell."""
    with suppress(OverflowError):
        pa.array([value])


def load_function(name: str, path: str | None) -> RowFunction | None:
    """Return the function that a spec names.

    Raises:
        BatchError: it cannot be imported.
    """
    return None if path is None else load(name, path)


def answer_schema(spec: BatchSpec, source: pa.Schema, engine: EngineTraits) -> pa.Schema:
    """Return the columns of an answered row, of one that no row function has changed.

    Raises:
        BatchError: a step's schema is none, or cannot be imported.
    """
    made = [column for step in spec.all_steps for column in compile_step(step, engine).columns]
    produced = {column.name for column in made}
    kept = [one for one in source if one.name not in produced and (spec.columns is None or one.name in spec.columns)]
    counts = [(PROMPT_TOKENS, pa.int64()), (COMPLETION_TOKENS, pa.int64()), (FINISH_REASON, pa.string())]
    return pa.schema([*kept, *made, pa.field(ROW_ID, pa.string()), *counts])
