"""``raylm estimate``: what a task will take, from the plan of its source and a sample of its rows."""

from __future__ import annotations

import argparse
import math
from collections import Counter

from airflow_provider_raylm.cli.chosen import Subject, engine_for
from airflow_provider_raylm.cli.connections import opened
from airflow_provider_raylm.cli.console import complain, say, table
from airflow_provider_raylm.cli.estimates import CONFIDENCE, Range, engine_seconds, total
from airflow_provider_raylm.cli.preview import MOST_ROWS
from airflow_provider_raylm.compat import AirflowException
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.specs.previews import PlanReport, PreviewReport

_HOUR = 3600.0
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def run(arguments: argparse.Namespace) -> int:
    """Print the figures of the plan and, unless --no-engine, those of a sample; 1 if no row was answered."""
    _check(arguments)
    subject = Subject(arguments)
    if arguments.no_engine:
        with opened(subject.conn_id) as jobs:
            _show_plan(subject.trial().plan(jobs))
        return 0
    with opened(subject.conn_id) as jobs, engine_for(subject, jobs, arguments.engine) as ref:
        found = subject.trial(ref)
        report = found.preview(jobs, arguments.sample, spread=True)
    if found.batch.deduplicate:
        complain("deduplicate: equal questions are asked once, which a sample does not see; it takes less then")
    _show_plan(report.plan)
    if not report.counts:
        return 0
    _show_sample(report)
    _show_estimate(report, ref.gpus_per_replica, subject.conn_id)
    return 0 if any(one.reason is None for one in report.counts) else 1


def _check(arguments: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        SpecError: they do.
    """
    if arguments.no_engine and arguments.engine:
        raise SpecError("--no-engine: --engine names one; give one of them")
    if not 2 <= arguments.sample <= MOST_ROWS:
        raise SpecError(f"--sample: between 2 and {MOST_ROWS} rows, got {arguments.sample}")


def _show_plan(plan: PlanReport) -> None:
    rows = "rows that only reading counts" if plan.rows is None else f"{plan.rows:,} rows"
    say(f"source: {plan.files:,} files, {_bytes(plan.bytes)}, {rows}")


def _show_sample(report: PreviewReport) -> None:
    counts = report.counts
    failures = Counter(one.reason for one in counts if one.reason is not None)
    told = f": {', '.join(f'{reason} {rows}' for reason, rows in failures.most_common())}" if failures else ""
    say(f"sample: {len(counts)} rows in {report.seconds:.1f} s, {failures.total()} failed{told}")


def _show_estimate(report: PreviewReport, gpus_per_replica: float, conn_id: str) -> None:
    rows = report.plan.rows or 0
    price = _price(conn_id)
    seconds = engine_seconds(report, rows)
    figures = [
        ("tokens in", total([one.prompt_tokens for one in report.counts], rows), 0),
        ("tokens out", total([one.completion_tokens for one in report.counts], rows), 0),
        ("engine hours", seconds.times(1 / _HOUR), 2),
    ]
    # Of the engine that was asked, which may be another than the DAG's: its pace is that of its GPUs.
    gpus = gpus_per_replica * report.replicas
    if gpus:
        hours = seconds.times(gpus / _HOUR)
        figures.append(("GPU hours", hours, 2))
        if price is not None:
            figures.append(("price", hours.times(price), 2))
    say()
    table(("", "EXPECTED", "FROM", "TO"), [(name, *_figures(found, digits)) for name, found, digits in figures])
    say()
    say(f"Of {CONFIDENCE:.0%} of such samples the ranges hold. Hours are those of work: an engine has to start before.")
    if gpus and price is None:
        complain(f"For a price, set price_per_gpu_hour in the extra of the connection {conn_id}.")


def _price(conn_id: str) -> float | None:
    try:
        return RayLMHook(conn_id).extra.price_per_gpu_hour
    # The cluster has answered already: only a test has no connection.
    except AirflowException:
        return None


def _figures(found: Range, digits: int) -> tuple[str, str, str]:
    expected = "" if found.expected is None else _number(found.expected, digits)
    return expected, _number(found.low, digits), _number(found.high, digits)


def _number(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "?"
    # A small job has hours that two digits would make none of.
    return f"{value:,.{digits}f}" if not digits or value == 0 or value >= 0.1 else f"{value:.1g}"


def _bytes(count: int) -> str:
    power = min(int(math.log(count, 1000)), len(_UNITS) - 1) if count else 0
    return f"{count / 1000**power:.{1 if power else 0}f} {_UNITS[power]}"
