"""One inference task: the plan of a source → blocks of rows → engine → parts, as a Ray Data pipeline.

One operator: an actor that reads, asks and writes, and more of them where one cannot keep all replicas busy. Reading by
Ray Data's own read tasks would start two more processes per job (5 CPU seconds each) and carry every row through the
object store, for files that one thread reads faster than any engine answers. The driver plans, counts, and says when it
is over.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray import serve
from ray.data import ActorPoolStrategy, DataContext

from airflow_provider_raylm.cluster.batch.affinity import by_prefix
from airflow_provider_raylm.cluster.batch.asking import Handle
from airflow_provider_raylm.cluster.batch.heartbeat import Say, Tell, heartbeat
from airflow_provider_raylm.cluster.batch.loop import gathered
from airflow_provider_raylm.cluster.batch.recovery import Recovery
from airflow_provider_raylm.cluster.batch.repeats import once
from airflow_provider_raylm.cluster.batch.report import COUNTS, Tally
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer
from airflow_provider_raylm.cluster.batch.storage import Place
from airflow_provider_raylm.cluster.batch.task import Work, answer_blocks, answer_source
from airflow_provider_raylm.cluster.batch.window import Window
from airflow_provider_raylm.cluster.engine import deploy, leases, status
from airflow_provider_raylm.cluster.locks import held
from airflow_provider_raylm.cluster.periodic import Periodic
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchReport, BatchSpec, EngineRef, EngineSpec, Progress

LOOK_PERIOD_S = 10.0
LOOK_TIMEOUT_S = 120.0
# What Ray Data does with each thing that a stage yields takes five milliseconds of processor time.
HAND_ON_PERIOD_S = 0.25
# One row for many blocks: Ray Data would cut a table of several rows into one for each.
_HANDED_ON = pa.schema([("blocks", pa.list_(pa.struct(list(COUNTS))))])

# Objects that are made and not given back between two searches for cycles. Python's own number, 700, is less than three
# for each row of a block.
COLLECT_AFTER = 50_000

# The stage waits most of the time: a fraction lets it run beside an engine that holds most CPUs.
STAGE_CPUS = 0.1
CPU_WAIT_S = 120.0


def infer(
    spec: BatchSpec,
    ref: EngineRef,
    say: Say,
    redeploy: EngineSpec | None = None,
    tell: Tell | None = None,
    price: float | None = None,
) -> BatchReport:
    """Answer every row of the source and return the report; the output's manifest is written last.

    An output that is complete already needs no engine, and no plan does.

    Args:
        spec: what to answer.
        ref: the engine.
        say: receives progress lines.
        redeploy: the engine's spec, to deploy it again if it is gone.
        tell: receives the progress every ten seconds, and whether it is time for a line in the task's log.
        price: of a GPU for an hour, for ``max_cost``.

    Raises:
        EngineError: the engine is gone or failed.
        BatchError: the source, its columns, the output, or more failed rows than the budget.
        SpecError: what it may spend is spent, or cannot be counted.
    """
    spec.require_task(ref.task)
    seconds = spec.paid_seconds(ref.gpus, price)
    tally = Tally()

    def answers(work: Work) -> Generator[dict[str, Any]]:
        if redeploy is not None:
            deploy.redeploy(redeploy, ref, say)
        status.wait_until_running(ref, spec.engine_timeout, say)
        with status.explained(ref.application):
            _require_cpus(work.stages * STAGE_CPUS)
            yield from _blocks(replace(work, seconds=seconds))

    def line(progress: Progress, due: bool) -> None:
        if due:
            say(progress.line())

    with heartbeat(ref.application, spec.output, tally, say, tell or line), _only_writer(spec.output, say):
        ref = with_vector_size(spec, ref, say)
        report = answer_source(spec, ref, answers, say, tally)
        leases.record(ref.application, report)
    return report


def with_vector_size(spec: BatchSpec, ref: EngineRef, say: Say) -> EngineRef:
    """Return the reference with what a column of embeddings needs; that of a lent engine lacks it."""
    if ref.vector_size or not any(step.embed is not None and step.dimensions is None for step in spec.all_steps):
        return ref
    status.wait_until_running(ref, spec.engine_timeout, say)
    return ref.model_copy(update={"vector_size": status.vector_size(ref)})


@contextmanager
def _only_writer(output: str, say: Say) -> Iterator[None]:
    """Be the only job that looks at and writes *output*: two would each answer what the other has not written yet."""
    place = Place(output).name
    waited = False

    def on_wait(_: float) -> None:
        nonlocal waited
        if not waited:
            say(f"another attempt is writing {output}: waiting until it has ended")
        waited = True

    with held(f"writes-{hashlib.sha256(place.encode()).hexdigest()[:20]}", on_wait):
        yield


def _blocks(work: Work) -> Iterator[dict[str, Any]]:
    """Yield the counts of each block as it is written."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data gathers what a task yields up to this size: hand counts on as they come.
    context.target_max_block_size = 1
    context.raise_original_map_exception = True
    # Ray Data would fail a task in which no block ends for half an hour; calls to the engine have their own bound.
    context.execution_no_progress_timeout_s = -1
    # from_items makes its blocks here; from_arrow would start a worker process to look at one.
    begin = ray.data.from_items([{"stage": stage} for stage in range(work.stages)], override_num_blocks=work.stages)
    counts = begin.map_batches(
        AnswerAndWrite,
        fn_constructor_args=(ray.put(work),),
        batch_size=None,
        batch_format="pyarrow",
        # One each: Ray Data would give the first actor that is up all of them.
        compute=ActorPoolStrategy(size=work.stages, max_tasks_in_flight_per_actor=1),
        num_cpus=STAGE_CPUS,
        # A new actor would begin with the first row; a new attempt of the task begins with the first that is missing.
        max_restarts=0,
    )
    for row in counts.iter_rows():
        yield from row["blocks"]


class AnswerAndWrite:
    """A stage's actor: a block is written by who got its answers, so that an answer is safe at once."""

    def __init__(self, reference: ray.ObjectRef[Work]) -> None:
        # All else is done in the call: what a constructor raises, Ray Data hands on a minute later.
        self._reference = reference

    def __call__(self, begin: pa.Table) -> Iterator[pa.Table]:
        """Read, answer and write this stage's blocks that are not done; yield the counts of each, in order."""
        work = replace(ray.get(self._reference), stage=begin["stage"][0].as_py())
        work.surroundings.enter()
        _collect_seldom(work.spec)
        me = ray.get_runtime_context().current_actor
        for counts in gathered(lambda: _answered(work, me), HAND_ON_PERIOD_S):
            yield pa.Table.from_pylist([{"blocks": counts}], schema=_HANDED_ON)


def _collect_seldom(spec: BatchSpec) -> None:
    """Spare this process most of Python's search for cycles.

    What was imported stays, and is not searched any more, as Serve and vLLM do it in their processes. Values, requests
    and answers form no cycles; what the author's functions make may, and may be large.
    """
    gc.collect()
    gc.freeze()
    if spec.preprocess is None and spec.postprocess is None:
        gc.set_threshold(COLLECT_AFTER)


async def _answered(work: Work, caller: Any) -> AsyncGenerator[dict[str, Any]]:
    """Yield the counts of a stage's blocks, as each is written."""
    spec, ref = work.spec, work.ref
    handle = Handle(
        serve.get_deployment_handle(ref.deployment, ref.application), ref, spec.output, spec.request_timeout, caller
    )
    there = await handle.arrive(spec.engine_timeout)
    in_flight_rows = spec.in_flight_rows and math.ceil(spec.in_flight_rows / work.stages)
    window = Window(in_flight_rows, work.plan.block_rows)

    async def follow() -> None:
        """Take as much of the engine as is this stage's."""
        # Equal shares between tasks, and between the stages of this one.
        share = len(there.tasks | {spec.output}) * work.stages
        window.fit(there.capacity / share, len(there.replicas) / share)
        await window.tell()

    async def look() -> None:
        nonlocal there
        there = await handle.look()
        await follow()

    await follow()
    recovery = Recovery(window.metered(handle.ask), lambda: handle.until_well(spec.engine_timeout))
    ask = by_prefix(recovery, lambda: len(there.replicas), lambda: there.cache_tokens)
    answerer = BlockAnswerer(spec, EngineTraits.of(ref), once(ask) if spec.deduplicate else ask)
    loop = asyncio.get_running_loop()
    looking = Periodic(
        "raylm-look",
        "looking at the engine",
        LOOK_PERIOD_S,
        lambda: asyncio.run_coroutine_threadsafe(look(), loop).result(LOOK_TIMEOUT_S),
        partial(print, flush=True),
    )
    try:
        async with aclosing(answer_blocks(work, answerer, window)) as counts:
            async for one in counts:
                yield one
    finally:
        looking.stop(0)


def _require_cpus(wanted: float) -> None:
    """Wait until the pipeline's own CPUs are free; without them Ray Data would wait for ever, in silence.

    Raises:
        BatchError: they are not free after two minutes.
    """
    end = time.monotonic() + CPU_WAIT_S
    while (free := ray.available_resources().get("CPU", 0.0)) < wanted:
        if time.monotonic() >= end:
            raise BatchError(
                f"the pipeline needs {wanted:g} CPUs beside the engine; {free:g} of "
                f"{ray.cluster_resources().get('CPU', 0.0):g} are free. Give the engine fewer CPUs, or add a node."
            )
        time.sleep(1)
