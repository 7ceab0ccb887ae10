"""From a block of rows to answers, through the engine's deployment handle."""

from __future__ import annotations

import hashlib
import importlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from airflow_provider_raylm.cluster import engine
from airflow_provider_raylm.cluster.recovery import AskEngine, EngineFailure
from airflow_provider_raylm.cluster.rows import Answer, Content, Refusal, RowError, compile_step, shared_fields
from airflow_provider_raylm.cluster.source import ROW_ID, as_text, common_type
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import RESERVED_PREFIX, BatchSpec, EngineRef

PROMPT_TOKENS = f"{RESERVED_PREFIX}prompt_tokens"
COMPLETION_TOKENS = f"{RESERVED_PREFIX}completion_tokens"
FINISH_REASON = f"{RESERVED_PREFIX}finish_reason"
REASON = f"{RESERVED_PREFIX}reason"
MESSAGE = f"{RESERVED_PREFIX}message"

Ask = Callable[[str, Sequence[Content]], list[Answer | Refusal]]
RowFunction = Callable[[dict[str, Any]], dict[str, Any]]

# How much longer than its rows' time a call may take before the replica counts as hung.
HUNG_AFTER_S = 60.0
PING_TIMEOUT_S = 40.0
PING_PERIOD_S = 2.0
LOOK_PERIOD_S = 10.0
# What a call through the handle raises when the engine or its replica is at fault.
ENGINE_FAILURES = (EngineError, RayError, RayServeException)


class Calls:
    """Calls on their way. They are cancelled when the engine is gone: Serve keeps one that no replica has for ever.

    Args:
        require_there: raises EngineError when the engine is gone.
    """

    def __init__(self, require_there: Callable[[], None]) -> None:
        self._require_there = require_there
        self._open: set[Any] = set()
        threading.Thread(target=self._look, name="raylm-calls", daemon=True).start()

    @contextmanager
    def open(self, response: Any) -> Iterator[Any]:
        """Yield the response of a call that is on its way while the body runs."""
        self._open.add(response)
        try:
            yield response
        finally:
            self._open.discard(response)

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_PERIOD_S)
            try:
                self._require_there()
            except EngineError:
                for response in tuple(self._open):
                    response.cancel()
            except (RayError, RayServeException):
                # Serve's controller is being restarted.
                continue


def through_handle(handle: Any, timeout: float, calls: Calls, caller: Any = None) -> AskEngine:
    """Return a function that asks a block of requests through a deployment handle.

    Args:
        handle: handle of a ``BlockLLMServer`` deployment.
        timeout: seconds per row in the engine.
        calls: holds those that are on their way.
        caller: handle of the actor that asks; the engine gives up what it asked when it has died.

    Raises (the returned function):
        EngineFailure: the engine failed, its replica is gone, or it does not answer at all.
    """

    def ask(fields: str, contents: Sequence[Content], *, alone: bool) -> list[Answer | Refusal]:
        begun = not alone
        try:
            if alone:
                stream = handle.options(stream=True).run_block_alone.remote(fields, list(contents), timeout, caller)
                with calls.open(stream):
                    next(stream)
                    begun = True
                    answers: list[Answer | Refusal] = next(stream)
            else:
                with calls.open(handle.run_block.remote(fields, list(contents), timeout, caller)) as response:
                    answers = _bounded(response, timeout + HUNG_AFTER_S)
        except ENGINE_FAILURES as error:
            raise EngineFailure(_last_line(error), begun) from None
        if len(answers) != len(contents):
            raise EngineError(f"the engine answered {len(answers)} of {len(contents)} rows of a block")
        return answers

    return ask


def until_well(handle: Any, ref: EngineRef, timeout: float) -> Callable[[], None]:
    """Return a function that waits until the engine answers.

    Args:
        handle: handle of a ``BlockLLMServer`` deployment.
        ref: the engine.
        timeout: seconds to wait at most.

    Raises (the returned function):
        EngineError: the engine is gone, another one, or not back in time.
    """

    def wait() -> None:
        end = time.monotonic() + timeout
        while True:
            engine.require_there(ref)
            try:
                _bounded(handle.ping.remote(), PING_TIMEOUT_S)
                return
            except ENGINE_FAILURES as error:
                if time.monotonic() >= end:
                    raise EngineError(
                        f"The engine {ref.application} failed and is not back after engine_timeout ({timeout:g} s): "
                        f"{_last_line(error)}. Retry the task when it is well: it goes on with the rows that are "
                        "missing. Or clear the deploy task together with this one."
                    ) from None
            time.sleep(PING_PERIOD_S)

    return wait


def _bounded(response: Any, timeout: float) -> Any:
    try:
        return response.result(timeout_s=timeout)
    except TimeoutError:
        response.cancel()
        raise EngineError(f"the engine did not answer within {timeout:g} s") from None


def _last_line(error: Exception) -> str:
    # The cause of what Ray wraps; of a traceback in a message, the line that says what was raised.
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]


# Answers that are kept for rows to come; one takes about a kilobyte.
ANSWERS_KEPT = 100_000


def once(ask: Ask, keep: int = ANSWERS_KEPT) -> Ask:
    """Return a function that asks equal requests once and gives all of them the one answer.

    A request that is on its way in another thread is waited for. Of answered requests the last *keep* are remembered.
    """
    known: OrderedDict[bytes, Future[Answer | Refusal]] = OrderedDict()
    lock = threading.Lock()

    def ask_new(fields: str, contents: Sequence[Content]) -> list[Answer | Refusal]:
        answers: list[Future[Answer | Refusal]] = []
        new: list[tuple[bytes, Future[Answer | Refusal], Content]] = []
        with lock:
            for content in contents:
                key = hashlib.blake2b(json.dumps([fields, content]).encode(), digest_size=16).digest()
                answer = known.get(key)
                if answer is None:
                    answer = known[key] = Future()
                    new.append((key, answer, content))
                answers.append(answer)
            while len(known) > keep:
                known.popitem(last=False)
        # Own requests first: whoever waits for another thread has none of its own left to ask.
        try:
            got = ask(fields, [content for *_, content in new]) if new else []
        except BaseException as error:
            for _, answer, _ in new:
                answer.set_exception(error)
            raise
        for (key, answer, _), outcome in zip(new, got, strict=True):
            if isinstance(outcome, Refusal) and outcome.reason == "timeout":
                # The engine's haste or rest is not the question's: the next equal row is asked again.
                with lock:
                    known.pop(key, None)
            answer.set_result(outcome)
        return [answer.result() for answer in answers]

    return ask_new


@dataclass
class _Block:
    """Rows on their way: each is either still asked about or failed, and never both."""

    rows: list[dict[str, Any]]
    failed: dict[int, Refusal] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = [0] * len(self.rows)
        self.completion_tokens = [0] * len(self.rows)
        self.finish_reasons = [""] * len(self.rows)

    def live(self) -> list[int]:
        return [i for i in range(len(self.rows)) if i not in self.failed]

    def apply(self, change: Callable[[dict[str, Any]], Any]) -> dict[int, Any]:
        """Call *change* for every live row; a RowError fails that row."""
        results = {}
        for i in self.live():
            try:
                results[i] = change(self.rows[i])
            except RowError as error:
                self.failed[i] = error.refusal
        return results


class BlockAnswerer:
    """Answers blocks for one task; holds nothing between blocks, so threads may share it.

    Args:
        spec: the task.
        model: the engine's served model name.
        ask: the way to the engine.

    Raises:
        BatchError: a row function cannot be imported.
    """

    def __init__(self, spec: BatchSpec, model: str, ask: Ask) -> None:
        self._spec = spec
        self._ask = ask
        self._steps = [(compile_step(step), shared_fields(step, model), step.output_column) for step in spec.all_steps]
        self._preprocess = _load("preprocess", spec.preprocess)
        self._postprocess = _load("postprocess", spec.postprocess)

    def answer(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Return (answered, failed) rows of *table*; together they are all of its rows."""
        block = _Block(table.drop_columns([ROW_ID]).to_pylist())
        self._transform(block, self._preprocess)
        for render, fields, column in self._steps:
            try:
                requests = block.apply(render)
            except KeyError as error:
                present = ", ".join(block.rows[0])
                raise BatchError(f"a row has no column {error}; it has {present}") from None
            answers = self._ask(fields, list(requests.values())) if requests else []
            for i, answer in zip(requests, answers, strict=True):
                if isinstance(answer, Refusal):
                    block.failed[i] = answer
                    continue
                block.rows[i] = {**block.rows[i], column: answer.text}
                block.prompt_tokens[i] += answer.prompt_tokens
                block.completion_tokens[i] += answer.completion_tokens
                block.finish_reasons[i] = answer.finish_reason
        self._transform(block, self._postprocess)
        return self._answered(table, block), _failed(table, block)

    def _transform(self, block: _Block, function: RowFunction | None) -> None:
        if function is None:
            return

        def change(row: dict[str, Any]) -> dict[str, Any]:
            try:
                changed = dict(function(dict(row)))
                for value in changed.values():
                    _require_storable(value)
                return changed
            except Exception as error:  # the author's own code, about this row
                raise RowError("row_function", f"{type(error).__name__}: {error}") from error

        for i, row in block.apply(change).items():
            block.rows[i] = row

    def _answered(self, table: pa.Table, block: _Block) -> pa.Table:
        live = block.live()
        kept = table.take(pa.array(live, pa.int64()))
        produced = [column for *_, column in self._steps]
        if self._preprocess is None and self._postprocess is None:
            names = [name for name in table.column_names if name != ROW_ID and name not in produced]
            if self._spec.columns is not None:
                names = [name for name in names if name in self._spec.columns]
            answered = kept.select(names)
        else:
            answered = self._rebuilt(table, block, live, produced)
        for column in produced:
            answered = answered.append_column(column, pa.array([block.rows[i].get(column) for i in live], pa.string()))
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


def _column(values: list[Any], known: pa.DataType) -> pa.Array:
    """Return the values as the type that they had before, else as one that holds them all."""
    try:
        return pa.array(values, known)
    except (pa.ArrowException, OverflowError):
        kind = common_type(pa.null(), values)
        return pa.array(list(map(as_text, values)) if pa.types.is_string(kind) else values, kind)


def _failed(table: pa.Table, block: _Block) -> pa.Table:
    """Return the failed rows as they came, with id, reason and message: enough to read and to replay them."""
    indices = sorted(block.failed)
    return (
        table.take(pa.array(indices, pa.int64()))
        .append_column(REASON, pa.array([block.failed[i].reason for i in indices], pa.string()))
        .append_column(MESSAGE, pa.array([block.failed[i].message for i in indices], pa.string()))
    )


def _require_storable(value: Any) -> None:
    """Raise what Arrow raises of a value that no file can hold: half a character, an object of some class."""
    with suppress(OverflowError):
        pa.array([value])


def _load(name: str, path: str | None) -> RowFunction | None:
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    try:
        function: RowFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BatchError(f"{name}: cannot import {path} on the cluster: {error}") from error
    return function
