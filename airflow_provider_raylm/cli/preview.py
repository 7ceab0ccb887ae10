"""``raylm preview``: what a task's first rows come to, before it runs, with nothing of them kept."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence

from airflow_provider_raylm.cli.chosen import Subject, engine_for
from airflow_provider_raylm.cli.connections import opened
from airflow_provider_raylm.cli.console import cut, one_line, say
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.sealing import new_pad, unseal
from airflow_provider_raylm.specs import build
from airflow_provider_raylm.specs.previews import PreviewReport, PreviewRow, RowCounts

MOST_ROWS = 100
_LINE_CHARACTERS = 240


def run(arguments: argparse.Namespace) -> int:
    """Ask the rows and print them; 1 if none was answered."""
    if arguments.rows > MOST_ROWS:
        raise SpecError(
            f"--rows: at most {MOST_ROWS}, got {arguments.rows}. For more, run the task with limit={arguments.rows}."
        )
    subject = Subject(arguments)
    # Once and for this command alone.
    pad = new_pad()
    with opened(subject.conn_id) as jobs, engine_for(subject, jobs, arguments.engine) as ref:
        report = subject.trial(ref).preview(jobs, arguments.rows, pad=pad)
        model = ref.model
    rows = [build(PreviewRow, one) for one in json.loads(unseal(report.sealed, pad))]
    for row, counts in zip(rows, report.counts, strict=True):
        _show(row, counts, full=arguments.full)
    _sum_up(report, model)
    return 0 if any(counts.reason is None for counts in report.counts) else 1


def _show(row: PreviewRow, counts: RowCounts, *, full: bool) -> None:
    say(f"row {one_line(row.row_id)}")
    for asked in row.asked:
        _text("asked", asked, full)
    for column, answer in row.answer.items():
        _text(column, answer, full)
    if counts.reason is not None:
        _text("failed", f"{counts.reason}: {row.message}", full)
    ended = f", {row.finish_reason}" if row.finish_reason else ""
    say(f"    {counts.prompt_tokens} tokens in, {counts.completion_tokens} out, {counts.seconds:.1f} s{ended}")
    say()


def _text(name: str, text: str, full: bool) -> None:
    lines = text.splitlines() if full else [cut(text, _LINE_CHARACTERS)]
    say("\n".join([f"    {name}: {lines[0] if lines else ''}", *(f"        {line}" for line in lines[1:])]))


def _sum_up(report: PreviewReport, model: str) -> None:
    counts = report.counts
    failures = Counter(one.reason for one in counts if one.reason is not None)
    told = f": {', '.join(f'{reason} {rows}' for reason, rows in failures.most_common())}" if failures else ""
    say(
        f"{len(counts)} rows asked of {model}: {len(counts) - failures.total()} answered, "
        f"{failures.total()} failed{told}"
    )
    say(f"{_total(counts, 'prompt_tokens')} tokens in, {_total(counts, 'completion_tokens')} out; nothing was written")


def _total(counts: Sequence[RowCounts], name: str) -> int:
    return sum(getattr(one, name) for one in counts)
