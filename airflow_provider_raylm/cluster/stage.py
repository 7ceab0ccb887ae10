"""From a block of rows to answers, through the engine's deployment handle.

The stage runs in one Ray Data actor with as many threads as blocks may be in flight. A thread waits for its block's
answers while the others' are on their way, so the engine always has a queue and no block end drains it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from ray.exceptions import RayTaskError

from airflow_provider_raylm.cluster.rows import Answer, RowError, compile_step
from airflow_provider_raylm.cluster.source import ROW_ID
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import RESERVED_PREFIX, BatchSpec

PROMPT_TOKENS = f"{RESERVED_PREFIX}prompt_tokens"
COMPLETION_TOKENS = f"{RESERVED_PREFIX}completion_tokens"
FINISH_REASON = f"{RESERVED_PREFIX}finish_reason"
REASON = f"{RESERVED_PREFIX}reason"
MESSAGE = f"{RESERVED_PREFIX}message"

Ask = Callable[[Sequence[str]], list["Answer | RowError"]]
RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


def through_handle(handle: Any, timeout: float) -> Ask:
    """Return a function that asks a block of requests through a deployment handle.

    Args:
        handle: handle of a ``BlockLLMServer`` deployment.
        timeout: seconds per row in the engine.

    Raises (the returned function):
        EngineError: the engine failed, or answered a row twice or not at all.
        RayError: its replica is gone.
    """
    stream = handle.options(stream=True)

    def ask(requests: Sequence[str]) -> list[Answer | RowError]:
        answers: list[Answer | RowError | None] = [None] * len(requests)
        try:
            for ready in stream.run_block.remote(list(requests), timeout):
                for text in ready:
                    outcome = json.loads(text)
                    index = outcome.pop("index")
                    if answers[index] is not None:
                        raise EngineError(f"the engine answered row {index} of a block twice")
                    answers[index] = RowError(**outcome) if "reason" in outcome else Answer(**outcome)
        except RayTaskError as error:
            # Ray's class for another process' error is made anew in each process and does not travel on.
            raise error.cause from None
        complete = [answer for answer in answers if answer is not None]
        if len(complete) != len(requests):
            raise EngineError(f"the engine answered {len(complete)} of {len(requests)} rows of a block")
        return complete

    return ask


@dataclass
class _Block:
    """Rows on their way: each is either still asked about or failed, and never both."""

    rows: list[dict[str, Any]]
    failed: dict[int, RowError] = field(default_factory=dict)
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
                self.failed[i] = error
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
        self._steps = [(compile_step(step, model), step.output_column) for step in spec.all_steps]
        self._preprocess = _load("preprocess", spec.preprocess)
        self._postprocess = _load("postprocess", spec.postprocess)

    def answer(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Return (answered, failed) rows of *table*; together they are all of its rows."""
        block = _Block(table.drop_columns([ROW_ID]).to_pylist())
        self._transform(block, self._preprocess)
        for render, column in self._steps:
            try:
                requests = block.apply(render)
            except KeyError as error:
                present = ", ".join(block.rows[0])
                raise BatchError(f"a row has no column {error}; it has {present}") from None
            for i, answer in zip(requests, self._ask(list(requests.values())) if requests else [], strict=True):
                if isinstance(answer, RowError):
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
                return dict(function(dict(row)))
            except Exception as error:  # the author's own code, about this row
                raise RowError("row_function", f"{type(error).__name__}: {error}") from error

        for i, row in block.apply(change).items():
            block.rows[i] = row

    def _answered(self, table: pa.Table, block: _Block) -> pa.Table:
        live = block.live()
        kept = table.take(pa.array(live, pa.int64()))
        produced = [column for _, column in self._steps]
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
            try:
                columns[name] = pa.array(values, table.schema.field(name).type if name in source else None)
            except pa.ArrowException:
                columns[name] = pa.array(values)
        return pa.table(columns) if columns else table.take(pa.array(live, pa.int64())).select([])


def _failed(table: pa.Table, block: _Block) -> pa.Table:
    """Return the failed rows as they came, with id, reason and message: enough to read and to replay them."""
    indices = sorted(block.failed)
    return (
        table.take(pa.array(indices, pa.int64()))
        .append_column(REASON, pa.array([block.failed[i].reason for i in indices], pa.string()))
        .append_column(MESSAGE, pa.array([str(block.failed[i]) for i in indices], pa.string()))
    )


def _load(name: str, path: str | None) -> RowFunction | None:
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    try:
        function: RowFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BatchError(f"{name}: cannot import {path} on the cluster: {error}") from error
    return function
