"""Counts of a task while it runs: summed per block, printed now and then, turned into the report at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.output import Written
from airflow_provider_raylm.cluster.batch.stage import MESSAGE, REASON, Answered
from airflow_provider_raylm.specs import Progress

ENGINE_COUNTS = (
    "prompt_tokens",
    "cached_prompt_tokens",
    "completion_tokens",
    "truncated_prompts",
    "cut_off",
    "reasked",
)
"""What ``Answered`` counts, by the name that the report has for it."""

COUNTS = pa.schema(
    [
        ("block", pa.string()),
        ("rows", pa.int64()),
        ("kept", pa.int64()),
        ("written", pa.int64()),
        *((name, pa.int64()) for name in ENGINE_COUNTS),
        ("failures", pa.list_(pa.string())),
        ("message", pa.string()),
        ("stopped", pa.string()),
    ]
)


def stopped(field: str) -> dict[str, Any]:
    """Return what comes after a stage's last block when blocks are left, because what *field* allows is spent."""
    return {"stopped": field}


def count_block(block: Written, answered: Answered) -> dict[str, Any]:
    """Return one block's counts, as ``COUNTS``.

    ``failures`` are "reason<tab>rows", which Arrow can carry for any reason; ``message`` is the first failed row's.
    """
    failed = answered.failed
    return {
        "block": block.name,
        "rows": block.rows,
        "kept": len(block.ids),
        "written": answered.rows.num_rows,
        **{name: answered.counts[name] for name in ENGINE_COUNTS},
        "failures": [f"{reason}\t{rows}" for reason, rows in Counter(failed[REASON].to_pylist()).items()],
        "message": failed[MESSAGE][0].as_py() if failed.num_rows else None,
    }


@dataclass
class Tally:
    """Running sums of a task.

    Attributes:
        total: rows to answer in this run, when the source tells it.
        blocks: names of the blocks that are done, also by earlier attempts, with their rows.
        failed: names of those with failed rows.
        kept: rows of this run's blocks that an earlier attempt had answered.
        engine: what the engine was paid for, by the names of ``ENGINE_COUNTS``.
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
            prompt_tokens=self.engine["prompt_tokens"],
            completion_tokens=self.engine["completion_tokens"],
        )

    def line(self, seconds: float) -> str:
        """Return the progress as one line for people."""
        return self.progress(seconds).line()
