"""A look at a task before it runs: its plan, without an engine; and what some of its rows come to, written nowhere."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Outcome, Request
from airflow_provider_raylm.cluster.batch.formats import tables
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID, Fragment
from airflow_provider_raylm.cluster.batch.plan import Plan, make_plan
from airflow_provider_raylm.cluster.batch.reader import read_blocks
from airflow_provider_raylm.cluster.batch.recovery import Ask
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.batch.stage import (
    FINISH_REASON,
    MESSAGE,
    REASON,
    Answered,
    BlockAnswerer,
    answer_schema,
    load_function,
)
from airflow_provider_raylm.cluster.batch.storage import reading
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.sealing import seal
from airflow_provider_raylm.specs import BatchSpec
from airflow_provider_raylm.specs.previews import PlanReport, PreviewRow, RowCounts

MOST_ROWS = 100
"""Rows that one look may ask."""
TEXT_CHARACTERS = 1000
# Blocks that a sample is spread over: each may be a file that is opened.
SPREAD = 10
# Files that are counted at a time; each holds a part of itself in memory.
_COUNTED_AT_A_TIME = 8

Say = Callable[[str], None]
_asked: ContextVar[list[str]] = ContextVar("asked")


def plan(spec: BatchSpec, say: Say) -> PlanReport:
    """Make the plan of a source, check all that a task checks before its first row, and say what it found.

    Raises:
        BatchError: the source, its columns, a schema of answers, or a row function that cannot be imported.
    """
    return planned(spec, make_plan(spec, say))


def planned(spec: BatchSpec, made: Plan, engine: EngineTraits | None = None) -> PlanReport:
    """Return what a plan says.

    Raises:
        BatchError: a schema of answers, or a row function that cannot be imported.
    """
    for name in ("preprocess", "postprocess"):
        load_function(name, getattr(spec, name))
    answered = answer_schema(spec, made.schema, engine or EngineTraits())
    return PlanReport(
        files=len(made.fragments),
        rows=made.rows,
        bytes=sum(fragment.file.size for fragment in made.fragments),
        columns={field.name: str(field.type) for field in made.schema},
        answers={field.name: str(field.type) for field in answered},
    )


def first_rows(spec: BatchSpec, rows: int, say: Say) -> tuple[Plan, pa.Table]:
    """Return a plan of the first rows, and these.

    Raises:
        BatchError: the source cannot be read.
    """
    made = make_plan(spec.model_copy(update={"limit": min(rows, spec.limit or rows)}), say)
    return made, _together(made, [table for _, table in read_blocks(made, lambda name: True)])


def spread_rows(spec: BatchSpec, rows: int, say: Say) -> tuple[Plan, pa.Table]:
    """Return the plan with all rows counted, and a sample from all over the source: its files may differ.

    Raises:
        BatchError: the source cannot be read.
    """
    made = make_plan(spec, say)
    unknown = sum(fragment.rows is None for fragment in made.fragments)
    if made.rows is None:
        say(f"counting the rows of {unknown} files, of which only reading tells")
        with ThreadPoolExecutor(_COUNTED_AT_A_TIME, thread_name_prefix="raylm-count") as pool:
            made = replace(made, fragments=list(pool.map(lambda one: _counted(made, one), made.fragments)))
    blocks = list(made.blocks())
    chosen = [blocks[at] for at in _evenly(len(blocks), SPREAD)]
    names = {made.name(block.fragments[0], block.first) for block in chosen}
    share = -(-rows // max(len(chosen), 1))
    found = [
        table.take(pa.array(_evenly(table.num_rows, share), pa.int64()))
        for _, table in read_blocks(made, lambda name: name in names)
    ]
    sample = _together(made, found)
    return made, sample.take(pa.array(_evenly(sample.num_rows, rows), pa.int64()))


async def answered(
    spec: BatchSpec, engine: EngineTraits, sample: pa.Table, ask: Ask, at_a_time: int
) -> AsyncGenerator[tuple[PreviewRow, RowCounts]]:
    """Ask rows, each by itself, and yield what comes of each, in order; texts are whole.

    Args:
        spec: the task.
        engine: whom they are asked.
        sample: the rows.
        ask: the way to the engine.
        at_a_time: rows that the engine works on at a time: so a row's time has no waiting for others in it.

    Raises:
        BatchError: what all rows share cannot be asked.
    """
    answerer = BlockAnswerer(spec, engine, _recorded(ask))
    columns = [column for step in spec.all_steps for column in step.output_columns]
    room = asyncio.Semaphore(at_a_time)

    async def one(number: int) -> tuple[PreviewRow, RowCounts]:
        row = sample.slice(number, 1)
        async with room:
            asked: list[str] = []
            _asked.set(asked)
            began = time.monotonic()
            block = await answerer.answer(row, f"preview-{number}")
            seconds = time.monotonic() - began
        return _shown(row[ROW_ID][0].as_py(), asked, columns, block), _took(block, seconds)

    tasks = [asyncio.create_task(one(number)) for number in range(sample.num_rows)]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shown(row_id: str, asked: Sequence[str], columns: Sequence[str], block: Answered) -> PreviewRow:
    failed = block.failed.num_rows > 0
    return PreviewRow(
        row_id=row_id,
        asked=tuple(asked),
        answer={} if failed else {name: _text(block.rows[name][0].as_py()) for name in columns},
        finish_reason="" if failed else block.rows[FINISH_REASON][0].as_py(),
        message=block.failed[MESSAGE][0].as_py() if failed else "",
    )


def _took(block: Answered, seconds: float) -> RowCounts:
    return RowCounts(
        prompt_tokens=block.counts["prompt_tokens"],
        completion_tokens=block.counts["completion_tokens"],
        seconds=round(seconds, 4),
        reason=block.failed[REASON][0].as_py() if block.failed.num_rows > 0 else None,
    )


def sealed(rows: Sequence[PreviewRow], pad: bytes) -> str:
    """Return rows for who has the pad, with their texts cut so that all fit.

    Raises:
        BatchError: nobody handed a pad over: these rows would stand in the job's log.
    """
    if not pad:
        raise BatchError("preview: nobody has said how to hide the rows from the job's log; ask by `raylm preview`.")
    most = TEXT_CHARACTERS
    while True:
        text = json.dumps([_cut(row, most).model_dump() for row in rows], ensure_ascii=False)
        if len(text.encode()) <= len(pad):
            return seal(text, pad)
        most //= 2


def _cut(row: PreviewRow, most: int) -> PreviewRow:
    return PreviewRow(
        row_id=row.row_id[:most],
        asked=tuple(_shortened(one, most) for one in row.asked[-10:]),
        answer={name: _shortened(one, most) for name, one in row.answer.items()},
        finish_reason=row.finish_reason,
        message=_shortened(row.message, most),
    )


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def _recorded(ask: Ask) -> Ask:
    """Return a function that asks, and notes what for the row that is asked about."""

    async def recorded(question: str, requests: Sequence[Request], near: str | None = None) -> list[Outcome]:
        _asked.get().extend(_question(request.content) for request in requests)
        return await ask(question, requests, near)

    return recorded


def _question(content: Any) -> str:
    if isinstance(content, list | tuple) and all(isinstance(one, Mapping) and "role" in one for one in content):
        return "\n".join(f"{turn['role']}: {_text(turn.get('content'))}" for turn in content)
    return _text(content)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = [_without_image(one) for one in value]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _without_image(part: Any) -> Any:
    """Return a part of a message with how large its image is, instead of the image."""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    return {"type": "image", "bytes": len(part["image_url"]["url"].partition(",")[2]) * 3 // 4}


def _together(made: Plan, found: Sequence[pa.Table]) -> pa.Table:
    if found:
        return pa.concat_tables(found)
    return made.schema.append(pa.field(ROW_ID, pa.string())).empty_table()


def _evenly(count: int, wanted: int) -> list[int]:
    """Return *wanted* positions of *count*, or all, with equal distances."""
    if wanted >= count:
        return list(range(count))
    return [number * count // wanted for number in range(wanted)]


def _counted(made: Plan, fragment: Fragment) -> Fragment:
    if fragment.rows is not None:
        return fragment
    with reading(fragment.file.uri, fragment.file.format):
        rows = sum(table.num_rows for _, table in tables(fragment.file, made.how, pa.schema([])))
    return replace(fragment, rows=rows)
