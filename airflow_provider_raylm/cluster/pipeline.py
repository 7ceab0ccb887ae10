"""One inference task: source → blocks of rows → engine → files, as a Ray Data pipeline.

One operator: an actor that reads, asks and writes. Reading by Ray Data's own read tasks would start two more processes
per job (5 CPU seconds each) and carry every row through the object store, for files that one thread reads faster than
any engine answers. The driver only counts.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray import serve
from ray.data import ActorPoolStrategy, DataContext

from airflow_provider_raylm.cluster import engine
from airflow_provider_raylm.cluster.recovery import Recovery
from airflow_provider_raylm.cluster.report import Tally, count_block
from airflow_provider_raylm.cluster.sinks import Output, checksum, task_fingerprint
from airflow_provider_raylm.cluster.source import (
    ROW_ID,
    SourceFile,
    check_columns,
    check_ids,
    columns_to_read,
    count_rows,
    list_files,
    read_blocks,
    schema_of,
)
from airflow_provider_raylm.cluster.stage import BlockAnswerer, Calls, once, through_handle, until_well
from airflow_provider_raylm.cluster.window import in_order, window
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import BatchReport, BatchSpec, EngineRef, EngineSpec

HEARTBEAT_PERIOD_S = 10.0
SAY_PERIOD_S = 30.0

# The stage waits most of the time: a fraction lets it run beside an engine that holds most CPUs.
STAGE_CPUS = 0.1
CPU_WAIT_S = 120.0
CAPACITY_TIMEOUT_S = 60.0
WRITER_END_S = 2.0

Say = Callable[[str], None]


def infer(spec: BatchSpec, ref: EngineRef, say: Say, redeploy: EngineSpec | None = None) -> BatchReport:
    """Answer every row of the source and return the report; the output's manifest is written last.

    An output that is complete already needs no engine.

    Args:
        spec: what to answer.
        ref: the engine.
        say: receives progress lines.
        redeploy: the engine's spec, to deploy it again if it is gone.

    Raises:
        EngineError: the engine is gone or failed.
        BatchError: the source, its columns, the output, or more failed rows than the budget.
    """
    started = time.monotonic()
    files = list_files(spec)
    columns = _columns(spec, files)
    check_ids(files, spec)
    mark = task_fingerprint(spec, ref.fingerprint, files)
    writer = _writer(spec.output)
    _wait_for_other_attempt(writer, spec.output, say)
    output = Output(spec, mark)
    finished = output.prepare()
    if finished is not None:
        say(f"{spec.output} is complete already ({finished.fingerprint}): nothing to do")
        return _nothing_to_do(finished)
    if redeploy is not None:
        engine.redeploy(redeploy, ref, say)
    engine.wait_until_running(ref, spec.engine_timeout, say)
    done = output.answers.row_ids()
    rows_known = count_rows(files)
    tally = Tally(total=rows_known - len(done) if rows_known is not None else None, ids=checksum([done]))
    say(f"{len(files)} files, {tally.total if tally.total is not None else 'unknown'} rows to answer")
    if len(done):
        say(f"{len(done)} rows are there from an earlier attempt")
    with engine.explained(ref.application), _heartbeat(ref.application, spec.output, tally, started, say):
        _require_cpus()
        for block in _blocks(spec, ref, mark, files, columns_to_read(spec, columns), done, writer):
            tally.add(block)
    if tally.total is not None and tally.rows != tally.total:
        raise BatchError(f"{tally.rows} rows were answered, but {tally.total} were to be; the output is not complete.")
    report = _report(spec, ref, mark, tally, len(done), time.monotonic() - started)
    _require_budget(spec, report)
    output.finish(report, tally.ids, _empty_schema(spec, columns))
    engine.record(ref.application, report)
    say(tally.line(time.monotonic() - started))
    return report


def _columns(spec: BatchSpec, files: list[SourceFile]) -> list[str]:
    """Return the source's columns, checked; a source without any row or header has none to check."""
    for file in files:
        columns = schema_of(file)
        if columns:
            check_columns(spec, columns)
            return columns
    return []


def _report(spec: BatchSpec, ref: EngineRef, mark: str, tally: Tally, already_done: int, seconds: float) -> BatchReport:
    return BatchReport(
        rows_in=already_done + tally.rows,
        rows_written=tally.written,
        rows_quarantined=tally.quarantined,
        rows_already_done=already_done,
        failures=dict(tally.failures),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        seconds=round(seconds, 3),
        source=spec.sources,
        output=spec.output,
        quarantine=spec.quarantine_uri,
        application=ref.application,
        model=ref.model,
        fingerprint=mark,
    )


def _writer(output: str) -> str:
    """Return the name of the one actor on the cluster that may write *output*."""
    return f"writes-{hashlib.sha256(output.encode()).hexdigest()[:20]}"


def _wait_for_other_attempt(writer: str, output: str, say: Say) -> None:
    """Return when nobody else writes *output*: two attempts would each answer what the other has not written yet."""
    waited = False
    while _is_there(writer):
        if not waited:
            say(f"another attempt is writing {output}: waiting until it has ended")
        waited = True
        time.sleep(1)
    if waited:
        # Ray gives an actor's name free before the process has ended.
        time.sleep(WRITER_END_S)


def _is_there(actor: str) -> bool:
    try:
        ray.get_actor(actor, engine.NAMESPACE)
    except ValueError:
        return False
    return True


def _blocks(
    spec: BatchSpec,
    ref: EngineRef,
    mark: str,
    files: list[SourceFile],
    columns: list[str] | None,
    done: pa.Array,
    writer: str,
) -> Iterator[dict[str, Any]]:
    """Yield the counts of each block as it is written, by an actor named *writer*."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data gathers what a task yields up to this size: hand each block's counts on at once.
    context.target_max_block_size = 1
    context.raise_original_map_exception = True
    # Ray Data would fail a task in which no block ends for half an hour; calls to the engine have their own bound.
    context.execution_no_progress_timeout_s = -1
    # from_items makes its blocks here; from_arrow would start a worker process to look at one.
    numbers = ray.data.from_items([{"file": file.number} for file in files], override_num_blocks=1)
    counts = numbers.map_batches(
        AnswerAndWrite,
        fn_constructor_args=(spec.model_dump(mode="json"), ref.model_dump(mode="json"), mark, files, columns, done),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        num_cpus=STAGE_CPUS,
        # A new actor would begin with the first row; a new attempt of the task begins with the first that is missing.
        max_restarts=0,
        # Ray refuses a second actor of this name, from any job, until this one has died, with its driver or before.
        name=writer,
        namespace=engine.NAMESPACE,
    )
    yield from counts.iter_rows()


class AnswerAndWrite:
    """The stage's actor: a block is written in the thread that got its answers, so an answer is safe at once."""

    def __init__(
        self,
        spec: dict[str, Any],
        ref: dict[str, Any],
        mark: str,
        files: list[SourceFile],
        columns: list[str] | None,
        done: pa.Array,
    ) -> None:
        task = BatchSpec.model_validate(spec)
        to = EngineRef.model_validate(ref)
        handle = serve.get_deployment_handle(to.deployment, to.application)
        wait = until_well(handle, to, task.engine_timeout)
        wait()
        self._window = window(task.in_flight_rows, task.block_rows, to.replicas * _capacity(handle))
        calls = Calls(partial(engine.require_there, to))
        me = ray.get_runtime_context().current_actor
        ask = Recovery(through_handle(handle, task.request_timeout, calls, me), wait)
        self._answerer = BlockAnswerer(task, to.model, once(ask) if task.deduplicate else ask)
        self._output = Output(task, mark)
        self._read = partial(
            read_blocks, columns=columns, id_column=task.id_column, block_rows=task.block_rows, done=done
        )
        self._files = {file.number: file for file in files}

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Read, answer and write the files that *table* names; yield each block's counts, in the source's order."""
        files = [self._files[number] for number in table["file"].to_pylist()]
        for counts in in_order(self._block, self._read(files), self._window):
            yield pa.Table.from_pylist([counts], schema=_COUNTS)

    def _block(self, block: pa.Table) -> dict[str, Any]:
        answered, failed = self._answerer.answer(block)
        if answered.num_rows:
            self._output.answers.write(answered)
        if failed.num_rows:
            self._output.quarantine.write(failed)
        return count_block(answered, failed)


def _capacity(handle: Any) -> int:
    try:
        return int(handle.capacity.remote().result(timeout_s=CAPACITY_TIMEOUT_S))
    except TimeoutError:
        raise EngineError(f"the engine does not answer ({CAPACITY_TIMEOUT_S:g} s)") from None


_COUNTS = pa.schema(
    [
        ("ids", pa.uint64()),
        ("written", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("failures", pa.list_(pa.string())),
    ]
)


def _empty_schema(spec: BatchSpec, columns: list[str]) -> pa.Schema:
    kept = [name for name in columns if spec.columns is None or name in spec.columns]
    names = [*(name for name in kept if name != ROW_ID), *(step.output_column for step in spec.all_steps), ROW_ID]
    return pa.schema([(name, pa.string()) for name in names])


def _nothing_to_do(finished: BatchReport) -> BatchReport:
    return finished.model_copy(
        update={
            "rows_written": 0,
            "rows_already_done": finished.rows_written + finished.rows_already_done,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "seconds": 0.0,
        }
    )


def _require_budget(spec: BatchSpec, report: BatchReport) -> None:
    allowed = math.floor(spec.error_budget * report.rows_in)
    if report.rows_quarantined > allowed:
        commonest = sorted(report.failures.items(), key=lambda item: -item[1])[:3]
        raise BatchError(
            f"{report.rows_quarantined} of {report.rows_in} rows failed, the error budget allows {allowed} "
            f"({spec.error_budget:.1%}). Commonest: {', '.join(f'{r} ({n} rows)' for r, n in commonest)}. The failed "
            f"rows with their messages are in {report.quarantine}; what was answered stays in {report.output}. Fix the "
            "cause and retry, or raise error_budget."
        )


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
def _heartbeat(application: str, output: str, tally: Tally, started: float, say: Say) -> Iterator[None]:
    """Renew the engine's lease and print progress while the body runs."""
    over = threading.Event()

    def beat() -> None:
        said_at = time.monotonic()
        said_trouble = None
        while not over.wait(HEARTBEAT_PERIOD_S):
            engine.renew(application, output)
            trouble = engine.trouble(application)
            if trouble and trouble != said_trouble:
                say(f"the engine is not well: {trouble}; what was on its way is asked again when it is back")
            said_trouble = trouble
            if time.monotonic() - said_at >= SAY_PERIOD_S - HEARTBEAT_PERIOD_S / 2:
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
