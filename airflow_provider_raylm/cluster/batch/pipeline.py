"""One inference task: the plan of a source → blocks of rows → engine → parts, as a Ray Data pipeline.

One operator: an actor that reads, asks and writes. Reading by Ray Data's own read tasks would start two more processes
per job (5 CPU seconds each) and carry every row through the object store, for files that one thread reads faster than
any engine answers. The driver plans, counts, and says when it is over.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray import serve
from ray.data import ActorPoolStrategy, DataContext

from airflow_provider_raylm.cluster import engine
from airflow_provider_raylm.cluster.batch.asking import Calls, meet, once, through_handle, until_well
from airflow_provider_raylm.cluster.batch.recovery import Recovery
from airflow_provider_raylm.cluster.batch.report import COUNTS, Tally
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer
from airflow_provider_raylm.cluster.batch.storage import Place
from airflow_provider_raylm.cluster.batch.task import Work, answer_blocks, answer_source
from airflow_provider_raylm.cluster.batch.window import window
from airflow_provider_raylm.cluster.locks import held
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchReport, BatchSpec, EngineRef, EngineSpec

HEARTBEAT_PERIOD_S = 10.0
SAY_PERIOD_S = 30.0

# The stage waits most of the time: a fraction lets it run beside an engine that holds most CPUs.
STAGE_CPUS = 0.1
CPU_WAIT_S = 120.0

Say = Callable[[str], None]


def infer(spec: BatchSpec, ref: EngineRef, say: Say, redeploy: EngineSpec | None = None) -> BatchReport:
    """Answer every row of the source and return the report; the output's manifest is written last.

    An output that is complete already needs no engine, and no plan does.

    Args:
        spec: what to answer.
        ref: the engine.
        say: receives progress lines.
        redeploy: the engine's spec, to deploy it again if it is gone.

    Raises:
        EngineError: the engine is gone or failed.
        BatchError: the source, its columns, the output, or more failed rows than the budget.
    """
    tally = Tally()

    def answers(work: Work) -> Generator[dict[str, Any]]:
        if redeploy is not None:
            engine.redeploy(redeploy, ref, say)
        engine.wait_until_running(ref, spec.engine_timeout, say)
        with engine.explained(ref.application):
            _require_cpus()
            yield from _blocks(work)

    with _only_writer(spec.output, say), _heartbeat(ref.application, spec.output, tally, say):
        report = answer_source(spec, ref, answers, say, tally)
        engine.record(ref.application, report)
    return report


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
    # Ray Data gathers what a task yields up to this size: hand each block's counts on at once.
    context.target_max_block_size = 1
    context.raise_original_map_exception = True
    # Ray Data would fail a task in which no block ends for half an hour; calls to the engine have their own bound.
    context.execution_no_progress_timeout_s = -1
    # from_items makes its blocks here; from_arrow would start a worker process to look at one.
    begin = ray.data.from_items([{"begin": True}], override_num_blocks=1)
    counts = begin.map_batches(
        AnswerAndWrite,
        fn_constructor_args=(ray.put(work),),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        num_cpus=STAGE_CPUS,
        # A new actor would begin with the first row; a new attempt of the task begins with the first that is missing.
        max_restarts=0,
    )
    yield from counts.iter_rows()


class AnswerAndWrite:
    """The stage's actor: a block is written in the thread that got its answers, so an answer is safe at once."""

    def __init__(self, reference: ray.ObjectRef[Work]) -> None:
        # All else is done in the call: what a constructor raises, Ray Data hands on a minute later.
        self._reference = reference

    def __call__(self, _: pa.Table) -> Iterator[pa.Table]:
        """Read, answer and write what is not done; yield each block's counts, in the source's order."""
        work = ray.get(self._reference)
        spec, ref = work.spec, work.ref
        handle = serve.get_deployment_handle(ref.deployment, ref.application)
        wait = until_well(handle, ref, spec.engine_timeout)
        at_a_time = window(spec.in_flight_rows, work.plan.block_rows, ref.replicas * meet(handle, wait))
        calls = Calls(partial(engine.require_there, ref))
        me = ray.get_runtime_context().current_actor
        ask = Recovery(through_handle(handle, spec.request_timeout, calls, me), wait)
        answerer = BlockAnswerer(spec, ref.model, once(ask) if spec.deduplicate else ask)
        for counts in answer_blocks(work, answerer, at_a_time):
            yield pa.Table.from_pylist([counts], schema=COUNTS)


def _require_cpus() -> None:
    """Wait until the pipeline's own CPUs are free; without them Ray Data would wait for ever, in silence.

    Raises:
        BatchError: they are not free after two minutes.
    """
    end = time.monotonic() + CPU_WAIT_S
    while (free := ray.available_resources().get("CPU", 0.0)) < STAGE_CPUS:
        if time.monotonic() >= end:
            raise BatchError(
                f"the pipeline needs {STAGE_CPUS:g} CPUs beside the engine; {free:g} of "
                f"{ray.cluster_resources().get('CPU', 0.0):g} are free. Give the engine fewer CPUs, or add a node."
            )
        time.sleep(1)


@contextmanager
def _heartbeat(application: str, output: str, tally: Tally, say: Say) -> Iterator[None]:
    """Renew the engine's lease and print progress while the body runs."""
    over = threading.Event()

    def beat() -> None:
        started = said_at = time.monotonic()
        said_trouble = None
        while not over.wait(HEARTBEAT_PERIOD_S):
            engine.renew(application, output)
            trouble = engine.trouble(application)
            if trouble and trouble != said_trouble:
                say(f"the engine is not well: {trouble}; what was on its way is asked again when it is back")
            said_trouble = trouble
            if tally.rows and time.monotonic() - said_at >= SAY_PERIOD_S - HEARTBEAT_PERIOD_S / 2:
                said_at = time.monotonic()
                say(tally.line(said_at - started))

    thread = threading.Thread(target=beat, name="raylm-heartbeat", daemon=True)
    engine.renew(application, output)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=engine.LEASE_CALL_TIMEOUT_S)
        engine.release(application, output)
