"""One inference task from its first look to its last write, without Ray: the engine and the way to it are arguments."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.budget import Allowance, require_allowance, require_budget, require_hope
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.identity import task_fingerprint
from airflow_provider_raylm.cluster.batch.loop import FileCalls, computed, in_threads
from airflow_provider_raylm.cluster.batch.output import Output, Progress
from airflow_provider_raylm.cluster.batch.parts import Parts, Written
from airflow_provider_raylm.cluster.batch.plan import Plan, make_plan
from airflow_provider_raylm.cluster.batch.reader import read_blocks
from airflow_provider_raylm.cluster.batch.report import ENGINE_COUNTS, Tally, count_block, stopped
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer, answer_schema
from airflow_provider_raylm.cluster.batch.window import Window, in_order
from airflow_provider_raylm.cluster.surroundings import Surroundings, entered
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchReport, BatchSpec, EngineRef

# One stage answers 25,000 rows/s of an engine that takes no time: more than eight replicas of any model do.
REPLICAS_PER_STAGE = 8
# Blocks that one stage takes in a row.
RUN = 4

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What the stage needs to know.

    Attributes:
        spec: the task.
        ref: the engine.
        plan: what to read.
        parts: where to write.
        progress: what is done already.
        stage: the number of the stage that works on it, of ``stages``.
        surroundings: what the stage's process enters.
        seconds: that it may take, for its ``max_cost``; None for no bound.
    """

    spec: BatchSpec
    ref: EngineRef
    plan: Plan
    parts: Parts
    progress: Progress
    stage: int = 0
    surroundings: Surroundings = field(default_factory=entered)
    seconds: float | None = None

    @property
    def stages(self) -> int:
        """How many stages work on it, side by side: each keeps eight replicas busy."""
        # Equal questions are asked once by a stage, which does not know what another asks.
        return 1 if self.spec.deduplicate else -(-self.ref.replicas // REPLICAS_PER_STAGE)

    def left(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield name and rows of the blocks of this stage that are not done."""
        turn = itertools.count()
        # In runs of blocks, so that a file is opened by few stages.
        return read_blocks(
            self.plan,
            lambda name: next(turn) // RUN % self.stages == self.stage and name not in self.progress.done,
        )


def answer_source(
    spec: BatchSpec,
    ref: EngineRef,
    answers: Callable[[Work], Generator[dict[str, Any]]],
    say: Say,
    tally: Tally,
    plan_of: Callable[[BatchSpec, Say], Plan] = make_plan,
) -> BatchReport:
    """Answer every row of the source that is not answered yet, and return the report.

    Args:
        spec: the task.
        ref: the engine.
        answers: does the work and yields each block's counts; not called when nothing is left to do.
        say: receives progress lines.
        tally: counts, while the work continues.
        plan_of: makes the plan.

    Raises:
        BatchError: the source, its columns, the output, or more failed rows than the budget.
        SpecError: the tokens or the money are spent that it may spend.
    """
    started = time.monotonic()
    plan = plan_of(spec, say)
    mark = task_fingerprint(spec, ref, plan.fragments)
    schema = answer_schema(spec, plan.schema, EngineTraits.of(ref))
    output = Output(spec, mark)
    begun = output.begin(schema)
    if isinstance(begun, BatchReport):
        say(f"{spec.output} is complete already ({begun.fingerprint}): nothing to do")
        return _nothing_to_do(begun)
    plan = replace(plan, block_rows=begun.block_rows)
    total = plan.rows
    done = sum(begun.done.values())
    tally.blocks.update(begun.done)
    tally.total = total - done if total is not None else None
    _say_beginning(plan, tally, done, say)
    # Closed: a stage must not write any more when the next attempt begins.
    with closing(answers(Work(spec, ref, plan, output.parts, begun))) as blocks:
        for block in blocks:
            tally.add(block)
            require_hope(spec, total, tally)
    _require_end(spec, total, tally)
    report = _report(spec, ref, mark, tally, done, time.monotonic() - started)
    require_budget(spec, report)
    output.finish(report, tally.blocks, tally.failed, schema)
    say(tally.line(time.monotonic() - started))
    return report


def _say_beginning(plan: Plan, tally: Tally, done: int, say: Say) -> None:
    say(f"{len(plan.fragments)} files, {tally.total if tally.total is not None else 'unknown'} rows to answer")
    if done:
        say(f"{done} rows are there from an earlier attempt")


def _require_end(spec: BatchSpec, total: int | None, tally: Tally) -> None:
    """Fail a task whose blocks have ended before its rows were all read."""
    require_allowance(spec, total, tally)
    if total is not None and (read := sum(tally.blocks.values())) != total:
        raise BatchError(f"{read} rows were read, but the source has {total}; the output is not complete.")


async def answer_blocks(work: Work, answerer: BlockAnswerer, window: Window) -> AsyncGenerator[dict[str, Any]]:
    """Read, answer and write the blocks that are not done; yield each one's counts, in the source's order.

    The last is ``stopped`` if blocks are left because what it may spend is spent.
    """
    most = work.spec.max_tokens_total
    allowance = Allowance(None if most is None else most / work.stages, work.seconds)
    files = FileCalls(local=work.parts.answers.local and work.parts.quarantine.local)

    async def answer(block: tuple[str, pa.Table]) -> dict[str, Any]:
        name, rows = block
        before = Written(name, rows.num_rows, had_failed=name in work.progress.failed)
        if name in work.progress.partly:
            before = await files(partial(work.parts.written, name, rows.num_rows))
            rows = rows.filter(pa.array([one not in before.ids for one in rows[ROW_ID].to_pylist()], pa.bool_()))
        answered = await answerer.answer(rows, name)
        allowance.add(before.rows, answered.counts)
        changes = await computed(work.parts.changes, before, answered.rows, answered.failed)
        await files(lambda: [change.make() for change in changes])
        return count_block(before, answered)

    blocks = in_threads(allowance.within(work.left()))
    async with aclosing(in_order(answer, blocks, window, lambda block: block[1].nbytes)) as counts:
        async for one in counts:
            yield one
    if allowance.over is not None:
        yield stopped(allowance.over)


def _report(spec: BatchSpec, ref: EngineRef, mark: str, tally: Tally, done: int, seconds: float) -> BatchReport:
    return BatchReport(
        rows_in=done + tally.kept + tally.rows,
        rows_written=tally.written,
        rows_quarantined=tally.quarantined,
        rows_already_done=done + tally.kept,
        failures=dict(tally.failures),
        **tally.engine,
        seconds=round(seconds, 3),
        source=spec.sources,
        output=spec.output,
        quarantine=spec.quarantine_uri,
        application=ref.application,
        model=ref.model,
        fingerprint=mark,
    )


def _nothing_to_do(finished: BatchReport) -> BatchReport:
    return finished.model_copy(
        update={
            "rows_written": 0,
            "rows_already_done": finished.rows_written + finished.rows_already_done,
            **dict.fromkeys(ENGINE_COUNTS, 0),
            "seconds": 0.0,
        }
    )
