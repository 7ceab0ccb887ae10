"""The rows of a preview on an engine that is up: through its handle, from the job's own process, without Ray Data."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from uuid import uuid4

import pyarrow as pa
from ray import serve

from airflow_provider_raylm.cluster.batch import preview
from airflow_provider_raylm.cluster.batch.asking import Engine, Handle
from airflow_provider_raylm.cluster.batch.exchange import Outcome, Request
from airflow_provider_raylm.cluster.batch.heartbeat import Say, heartbeat
from airflow_provider_raylm.cluster.batch.loop import drained
from airflow_provider_raylm.cluster.batch.pipeline import with_vector_size
from airflow_provider_raylm.cluster.batch.recovery import Ask, EngineFailure
from airflow_provider_raylm.cluster.batch.report import Tally
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.engine import status
from airflow_provider_raylm.errors import EngineError, SpecError
from airflow_provider_raylm.specs import BatchSpec, EngineRef
from airflow_provider_raylm.specs.previews import PreviewReport, PreviewRow, RowCounts


def look(spec: BatchSpec, ref: EngineRef, rows: int, spread: bool, pad: bytes | None, say: Say) -> PreviewReport:
    """Ask some rows of a task, and return what they took, and what came of them for who has the pad.

    Args:
        spec: the task; of its output only the place is looked at, because it may not lie in the source.
        ref: the engine.
        rows: how many.
        spread: take them from all over the source, and count it; else the first ones.
        pad: seals the rows; None returns their counts alone.
        say: receives progress lines.

    Raises:
        EngineError: the engine is gone or failed.
        BatchError: the source, its columns, what all rows share, or a pad that is empty.
        SpecError: too many rows, or a question that the engine is not loaded for.
    """
    if not 1 <= rows <= preview.MOST_ROWS:
        raise SpecError(f"rows: between 1 and {preview.MOST_ROWS}, got {rows}")
    spec.require_task(ref.task)
    if pad is not None:
        # Before rows are asked that could not be told.
        preview.sealed([], pad)
    # As a task at work, the engine is not torn down under it by those who wait, and its lease holds.
    name = f"preview-{uuid4().hex[:12]}"
    with heartbeat(ref.application, name, Tally(), say, lambda progress, due: None), status.explained(ref.application):
        ref = with_vector_size(spec, ref, say)
        made, sample = (preview.spread_rows if spread else preview.first_rows)(spec, rows, say)
        planned = preview.planned(spec, made, EngineTraits.of(ref))
        say(f"{planned.files} files, {planned.rows if spread else 'some'} rows; asking {sample.num_rows}")
        status.wait_until_running(ref, spec.engine_timeout, say)
        engine: list[tuple[Engine, float]] = []
        found = list(drained(partial(_answered, spec, ref, name, sample, engine)))
        there, began = engine[0]
        seconds = time.monotonic() - began
    return PreviewReport(
        plan=planned,
        counts=tuple(counts for _, counts in found),
        seconds=round(seconds, 3),
        capacity=max(there.capacity, 1),
        replicas=max(len(there.replicas), 1),
        sealed="" if pad is None else preview.sealed([row for row, _ in found], pad),
    )


async def _answered(
    spec: BatchSpec, ref: EngineRef, name: str, sample: pa.Table, engine: list[tuple[Engine, float]]
) -> AsyncGenerator[tuple[PreviewRow, RowCounts]]:
    """Yield what comes of each row of a sample; *engine* is given what the engine is, and when it began to be asked."""
    handle = Handle(serve.get_deployment_handle(ref.deployment, ref.application), ref, name, spec.request_timeout)
    there = await handle.arrive(spec.engine_timeout)
    engine.append((there, time.monotonic()))
    # Of an engine that others use, too, as much as is this one's.
    share = math.ceil(there.capacity / len(there.tasks | {name}))
    async with aclosing(preview.answered(spec, EngineTraits.of(ref), sample, _ask(handle), share)) as answers:
        async for one in answers:
            yield one


def _ask(handle: Handle) -> Ask:
    """Return the way to the engine without recovery: who looks on tries again, and no other task waits for that."""

    async def ask(question: str, requests: Sequence[Request], near: str | None = None) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        try:
            async for part in handle.ask(question, requests, alone=False, near=near):
                outcomes.update(part)
        except EngineFailure as error:
            raise EngineError(f"The engine failed while it had rows of this preview: {error}. Try again.") from None
        return [outcomes[number] for number in range(len(requests))]

    return ask
