"""When a task fails for its failed rows: as soon as no more answers can save it, and at its end."""

from __future__ import annotations

import math

from airflow_provider_raylm.cluster.batch.report import Tally
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchReport, BatchSpec

# So many whole blocks that fail for one reason, before anything is answered, are the spec's fault.
HOPELESS_BLOCKS = 4


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
