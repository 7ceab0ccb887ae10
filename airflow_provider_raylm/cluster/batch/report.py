"""Counts of a task while it runs: summed per block, printed now and then, turned into the report at the end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.parts import Written
from airflow_provider_raylm.cluster.batch.stage import MESSAGE, REASON, Answered
from airflow_provider_raylm.cluster.surroundings import hidden
from airflow_provider_raylm.specs import FailedRow, Progress
from airflow_provider_raylm.specs.reports import FAILED_ROWS

ENGINE_COUNTS = (
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "truncated_prompts",
    "cut_off",
    "reasked",
)
"""What ``Answered`` counts, by the name that the report has for it."""

# Their messages are sentences of this package's own, of columns and numbers. Those of all others may quote the row, and
# the log that tells of it is not for rows.
_QUOTE_NO_ROW = frozenset({"null_value", "empty_prompt", "invalid_conversation", "answer_cut_off", "timeout"})
# Of an id and of a message, as a log has them: what one process prints in one go, no other writes into.
_TEXT_BYTES = 200

COUNTS = pa.schema(
    [
        ("block", pa.string()),
        ("rows", pa.int64()),
        ("kept", pa.int64()),
        ("written", pa.int64()),
        *((name, pa.int64()) for name in ENGINE_COUNTS),
        ("failures", pa.list_(pa.string())),
        ("failed_rows", pa.list_(pa.string())),
        ("message", pa.string()),
        ("stopped", pa.string()),
    ]
)


def stopped(field: str) -> dict[str, Any]:
    """Return what comes after a stage's last block when blocks are left, because what *field* allows is spent."""
    return {"stopped": field}


_FAILED = [ROW_ID, REASON, MESSAGE]


def count_block(block: Written, answered: Answered) -> dict[str, Any]:
    """Return one block's counts, as ``COUNTS``.

    ``failures`` are "reason<tab>rows", which Arrow can carry for any reason; ``failed_rows`` are the first ones, each
    as JSON text; ``message`` is the first one's.
    """
    failed = answered.failed
    return {
        "block": block.name,
        "rows": block.rows,
        "kept": len(block.ids),
        "written": answered.rows.num_rows,
        **{name: answered.counts[name] for name in ENGINE_COUNTS},
        "failures": [f"{reason}\t{rows}" for reason, rows in Counter(failed[REASON].to_pylist()).items()],
        "failed_rows": [_told(row) for row in failed.slice(0, FAILED_ROWS).select(_FAILED).to_pylist()],
        "message": failed[MESSAGE][0].as_py() if failed.num_rows else None,
    }


def _told(row: dict[str, str]) -> str:
    """Return a failed row as the job's log may have it: bounded in bytes, without secrets and without its values."""
    message = row[MESSAGE] if row[REASON] in _QUOTE_NO_ROW else ""
    return FailedRow(row_id=_cut(row[ROW_ID]), reason=row[REASON], message=_cut(message)).model_dump_json()


def _cut(text: str) -> str:
    # Before anything is cut: a part of a secret would not be known for one.
    text = hidden(text)
    room = _TEXT_BYTES
    for at, character in enumerate(text):
        room -= len(json.dumps(character)) - 2
        if room < 0:
            return f"{text[:at]}…"
    return text


@dataclass
class Tally:
    """Running sums of a task.

    Attributes:
        total: rows to answer in this run, when the source tells it.
        blocks: names of the blocks that are done, also by earlier attempts, with their rows.
        failed: names of those with failed rows.
        kept: rows of this run's blocks that an earlier attempt had answered.
        engine: what the engine was paid for, by the names of ``ENGINE_COUNTS``.
        failed_rows: the first rows that failed.
        message: what the first failed row met with.
        stopped_by: the field by which a stage has left blocks: what it allows is spent.
    """

    total: int | None = None
    blocks: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    kept: int = 0
    written: int = 0
    engine: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    failed_rows: list[FailedRow] = field(default_factory=list)
    message: str = ""
    stopped_by: str | None = None

    def add(self, block: dict[str, Any]) -> None:
        """Add what ``count_block`` or ``stopped`` returned."""
        if block.get("stopped"):
            self.stopped_by = block["stopped"]
            return
        self.blocks[block["block"]] = block["rows"]
        self.kept += block["kept"]
        self.written += block["written"]
        self.engine.update({name: block[name] for name in ENGINE_COUNTS})
        for entry in block["failures"]:
            reason, rows = entry.split("\t")
            self.failures[reason] += int(rows)
            self.failed.add(block["block"])
        for text in block["failed_rows"][: FAILED_ROWS - len(self.failed_rows)]:
            self.failed_rows.append(FailedRow.model_validate_json(text))
        self.message = self.message or block["message"] or ""

    @property
    def quarantined(self) -> int:
        """Rows that failed."""
        return self.failures.total()

    @property
    def rows(self) -> int:
        """Rows that ended in this run, either way."""
        return self.written + self.quarantined

    def progress(self, seconds: float, at: float = 0.0) -> Progress:
        """Return how far the task is, *seconds* after its beginning, at *at* (Unix seconds)."""
        return Progress(
            at=at,
            seconds=seconds,
            rows=self.rows,
            total=self.total,
            failures=dict(self.failures),
            failed_rows=tuple(self.failed_rows),
            prompt_tokens=self.engine["prompt_tokens"],
            completion_tokens=self.engine["completion_tokens"],
        )

    def line(self, seconds: float) -> str:
        """Return the progress as one line for people."""
        return self.progress(seconds).line()
