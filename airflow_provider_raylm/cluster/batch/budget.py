"""When a task ends before its rows do: for too many failed ones, or because its tokens or its money are spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.report import Tally
from airflow_provider_raylm.errors import BatchError, SpecError
from airflow_provider_raylm.specs import BatchReport, BatchSpec

# So many whole blocks that fail for one reason, before anything is answered, are the spec's fault.
HOPELESS_BLOCKS = 4


class Allowance:
    """What one stage may spend: it begins no block when what is in flight will have spent it.

    Args:
        tokens: of ``max_tokens_total``; None for no bound.
        seconds: that ``max_cost`` pays for, from now on; None for no bound.
        clock: seconds, as ``time.monotonic``.

    Attributes:
        over: the field that has had a block left; None while none has.
    """

    def __init__(
        self, tokens: float | None, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tokens = math.inf if tokens is None else tokens
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds
        self._spent = 0
        self._begun = self._ended = 0
        self.over: str | None = None

    def within(self, blocks: Iterator[tuple[str, pa.Table]]) -> Iterator[tuple[str, pa.Table]]:
        """Yield blocks until it is spent."""
        for name, rows in blocks:
            self.over = self._spent_field()
            if self.over is not None:
                return
            self._begun += rows.num_rows
            yield name, rows

    def _spent_field(self) -> str | None:
        if self._expected() >= self._tokens:
            return "max_tokens_total"
        return "max_cost" if self._clock() >= self._end else None

    def add(self, rows: int, counts: Mapping[str, int]) -> None:
        """Add a block that has ended, by its rows and what they took."""
        self._ended += rows
        self._spent += counts["prompt_tokens"] + counts["completion_tokens"]

    def _expected(self) -> float:
        """Return what will have been spent when all that is begun has ended, if that is like what has."""
        return self._spent * self._begun / self._ended if self._ended else 0.0


def require_allowance(spec: BatchSpec, total: int | None, tally: Tally) -> None:
    """End a task whose tokens or money are spent before its rows are done.

    Args:
        spec: the task.
        total: rows of the source, when that is known.
        tally: what came of the rows.

    Raises:
        SpecError: they are. The author has to decide: a retry would spend as many again.
    """
    if tally.stopped_by is None:
        return
    spent = tally.engine["prompt_tokens"] + tally.engine["completion_tokens"]
    of = f" of {total:,}" if total is not None else ""
    bound = getattr(spec, tally.stopped_by)
    raise SpecError(
        f"{tally.stopped_by}: an attempt may spend {bound:,}, and has; it took {spent:,} tokens. "
        f"{sum(tally.blocks.values()):,}{of} rows are done, {tally.quarantined:,} of them failed. What was answered "
        f"stays in {spec.output}. For the rest, clear the task, with a larger {tally.stopped_by} or the same."
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
    if total is not None and tally.quarantined > (allowed := math.floor(spec.max_failed_fraction * total)):
        raise BatchError(
            f"{tally.quarantined} of {total} rows have failed already, the error budget allows {allowed} "
            f"({spec.max_failed_fraction:.1%}): the rest is not asked. {_what_failed(spec, tally.failures)}"
        )
    nothing_answered = not tally.written and not tally.kept
    if (
        spec.max_failed_fraction < 1
        and nothing_answered
        and len(tally.failures) == 1
        and len(tally.failed) >= HOPELESS_BLOCKS
    ):
        raise BatchError(
            f"the first {tally.quarantined} rows all failed for one reason: the rest is not asked. The first was told: "
            f"{tally.message} {_what_failed(spec, tally.failures)}"
        )


def require_budget(spec: BatchSpec, report: BatchReport) -> None:
    """Fail a task with more failed rows than its budget allows.

    Raises:
        BatchError: it has.
    """
    allowed = math.floor(spec.max_failed_fraction * report.rows_in)
    if report.rows_quarantined > allowed:
        raise BatchError(
            f"{report.rows_quarantined} of {report.rows_in} rows failed, the error budget allows {allowed} "
            f"({spec.max_failed_fraction:.1%}). {_what_failed(spec, report.failures)}"
        )


def _what_failed(spec: BatchSpec, failures: dict[str, int]) -> str:
    commonest = sorted(failures.items(), key=lambda item: -item[1])[:3]
    return (
        f"Commonest: {', '.join(f'{reason} ({rows} rows)' for reason, rows in commonest)}. The failed rows with their "
        f"messages are in {spec.quarantine_uri}; what was answered stays in {spec.output}. Fix the cause and retry, or "
        "raise max_failed_fraction."
    )
