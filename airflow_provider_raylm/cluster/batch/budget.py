"""When a task ends before its rows do: for too many failed ones, or because its tokens are spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.report import Tally
from airflow_provider_raylm.errors import BatchError, SpecError
from airflow_provider_raylm.specs import BatchReport, BatchSpec

# So many whole blocks that fail for one reason, before anything is answered, are the spec's fault.
HOPELESS_BLOCKS = 4


class Allowance:
    """What one stage may spend of ``max_tokens_total``: it begins no block when what is in flight will have spent it.

    Args:
        tokens: None for no bound.
    """

    def __init__(self, tokens: float | None) -> None:
        self._tokens = math.inf if tokens is None else tokens
        self._spent = 0
        self._begun = self._ended = 0
        self.is_over = False
        """Whether a block was left."""

    def within(self, blocks: Iterator[tuple[str, pa.Table]]) -> Iterator[tuple[str, pa.Table]]:
        """Yield blocks until the tokens are spent."""
        for name, rows in blocks:
            if self._expected() >= self._tokens:
                self.is_over = True
                return
            self._begun += rows.num_rows
            yield name, rows

    def add(self, rows: int, counts: Mapping[str, int]) -> None:
        """Add a block that has ended, by its rows and what they took."""
        self._ended += rows
        self._spent += counts["prompt_tokens"] + counts["completion_tokens"]

    def _expected(self) -> float:
        """Return what will have been spent when all that is begun has ended, if that is like what has."""
        return self._spent * self._begun / self._ended if self._ended else 0.0


def require_tokens(spec: BatchSpec, total: int | None, tally: Tally) -> None:
    """End a task whose tokens are spent before its rows are done.

    Args:
        spec: the task.
        total: rows of the source, when that is known.
        tally: what came of the rows.

    Raises:
        SpecError: they are. The author has to decide: a retry would spend as many again.
    """
    if not tally.is_stopped:
        return
    spent = tally.engine["prompt_tokens"] + tally.engine["completion_tokens"]
    of = f" of {total:,}" if total is not None else ""
    raise SpecError(
        f"max_tokens_total: {spent:,} tokens are spent, of {spec.max_tokens_total:,} that an attempt may spend; "
        f"{sum(tally.blocks.values()):,}{of} rows are done, {tally.quarantined:,} of them failed. What was answered "
        f"stays in {spec.output}. For the rest, clear the task, with a larger max_tokens_total or the same."
    )


def require_hope(spec: BatchSpec, total: int | None, tally: Tally) -> None:
    """End a task whose budget cannot be met any more, or whose rows all fail of what they share.

    Args:
        spec: the task.
        total: rows of the source, when that is known.
        tally: what came of the rows so far.

    Raises:
        BatchError: asking the rest would be in vain.
    """
    if total is not None and tally.quarantined > (allowed := math.floor(spec.error_budget * total)):
        raise BatchError(
            f"{tally.quarantined} of {total} rows have failed already, the error budget allows {allowed} "
            f"({spec.error_budget:.1%}): the rest is not asked. {_what_failed(spec, tally.failures)}"
        )
    nothing_answered = not tally.written and not tally.kept
    if spec.error_budget < 1 and nothing_answered and len(tally.failures) == 1 and len(tally.failed) >= HOPELESS_BLOCKS:
        raise BatchError(
            f"the first {tally.quarantined} rows all failed for one reason: the rest is not asked. The first was told: "
            f"{tally.message} {_what_failed(spec, tally.failures)}"
        )


def require_budget(spec: BatchSpec, report: BatchReport) -> None:
    """Fail a task with more failed rows than its budget allows.

    Raises:
        BatchError: it has.
    """
    allowed = math.floor(spec.error_budget * report.rows_in)
    if report.rows_quarantined > allowed:
        raise BatchError(
            f"{report.rows_quarantined} of {report.rows_in} rows failed, the error budget allows {allowed} "
            f"({spec.error_budget:.1%}). {_what_failed(spec, report.failures)}"
        )


def _what_failed(spec: BatchSpec, failures: dict[str, int]) -> str:
    commonest = sorted(failures.items(), key=lambda item: -item[1])[:3]
    return (
        f"Commonest: {', '.join(f'{reason} ({rows} rows)' for reason, rows in commonest)}. The failed rows with their "
        f"messages are in {spec.quarantine_uri}; what was answered stays in {spec.output}. Fix the cause and retry, or "
        "raise error_budget."
    )
