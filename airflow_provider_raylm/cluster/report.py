"""Counts of a task while it runs: summed per block, printed now and then, turned into the report at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.sinks import checksum
from airflow_provider_raylm.cluster.source import ROW_ID
from airflow_provider_raylm.cluster.stage import COMPLETION_TOKENS, PROMPT_TOKENS, REASON


def count_block(answered: pa.Table, failed: pa.Table) -> dict[str, Any]:
    """Return one block's counts; ``failures`` as a list of [reason, rows], which Arrow can carry for any reason."""
    return {
        "ids": checksum([*answered[ROW_ID].chunks, *failed[ROW_ID].chunks]),
        "written": answered.num_rows,
        "prompt_tokens": sum(answered[PROMPT_TOKENS].to_pylist()),
        "completion_tokens": sum(answered[COMPLETION_TOKENS].to_pylist()),
        "failures": [f"{reason}\t{rows}" for reason, rows in Counter(failed[REASON].to_pylist()).items()],
    }


@dataclass
class Tally:
    """Running sums of a task.

    Attributes:
        total: rows to answer in this run, when the source tells it.
        ids: checksum of the ids of the rows so far; begins with that of the rows that were there.
    """

    total: int | None
    ids: int = 0
    written: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, block: dict[str, Any]) -> None:
        """Add what ``count_block`` returned."""
        self.ids = (self.ids + block["ids"]) % 2**64
        self.written += block["written"]
        self.prompt_tokens += block["prompt_tokens"]
        self.completion_tokens += block["completion_tokens"]
        for entry in block["failures"]:
            reason, rows = entry.split("\t")
            self.failures[reason] += int(rows)

    @property
    def quarantined(self) -> int:
        """Rows that failed."""
        return self.failures.total()

    @property
    def rows(self) -> int:
        """Rows that ended in this run, either way."""
        return self.written + self.quarantined

    def line(self, seconds: float) -> str:
        """Return progress as one line: rows, failed rows, rows/s, tokens/s, and the time left when it is known."""
        rate = self.rows / seconds if seconds else 0.0
        of = f" of {self.total}" if self.total is not None else ""
        parts = [
            f"{self.rows}{of} rows",
            f"{self.quarantined} failed",
            f"{rate:.1f} rows/s",
            f"{self.completion_tokens / seconds if seconds else 0.0:.0f} tokens/s",
        ]
        if self.total is not None and rate:
            parts.append(f"{max(self.total - self.rows, 0) / rate:.0f} s left")
        return ", ".join(parts)
