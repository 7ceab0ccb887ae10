"""The page that the demo leaves: one HTML file with when each job ran, how fast it was, and rows with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2330; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left; vertical-align: top }
tr + tr { border-top: 1px solid #d8dde6 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto } text { font-size: 11px; fill: currentColor }
rect { fill: #3569c4 } rect.engine { fill: #9db6e3 }
@media (prefers-color-scheme: dark) { body { color: #dfe5ee; background: #14181f } tr + tr { border-color: #333b48 } }
"""
_LEFT, _WIDTH, _HEIGHT = 130, 860, 24


def write_page(
    path: Path,
    jobs: Sequence[tuple[str, float, float]],
    tasks: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Any],
) -> Path:
    """Write the page.

    Args:
        path: the file.
        jobs: (name, begin, end) of each Ray job, in Unix seconds.
        tasks: for each inference task what is shown of it, by the table's columns.
        rows: for each task some (text, answer).
    """
    parts = [
        "<!doctype html><meta charset=utf-8><title>raylm demo</title>",
        f"<style>{_STYLE}</style><h1>One engine, {len(tasks)} tasks</h1>",
        "<p>The quickstart DAG on this machine: an engine that was deployed once, asked by every task through its "
        "handle, and torn down.</p><h2>When each job ran, in seconds</h2>",
        _timeline(jobs),
        "<h2>What the tasks did</h2>",
        _table([{"task": name, **columns} for name, columns in tasks.items()]),
    ]
    for name, some in rows.items():
        parts += [f"<h2>{escape(name)}</h2>", _table([{"row": text, "answer": answer} for text, answer in some])]
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _timeline(jobs: Sequence[tuple[str, float, float]]) -> str:
    first, last = min(begin for _, begin, _ in jobs), max(end for _, _, end in jobs)
    scale = (_WIDTH - _LEFT - 50) / max(last - first, 1.0)
    bars = []
    for number, (name, begin, end) in enumerate(jobs):
        x, y, width = _LEFT + (begin - first) * scale, number * _HEIGHT, max((end - begin) * scale, 2)
        kind = ' class="engine"' if name.startswith(("deploy", "teardown")) else ""
        bars.append(
            f'<text x="0" y="{y + 15}">{escape(name)}</text><rect{kind} x="{x:.1f}" y="{y + 3}" width="{width:.1f}" '
            f'height="16"/><text x="{x + width + 4:.1f}" y="{y + 15}">{end - begin:.0f}</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {len(jobs) * _HEIGHT}">{"".join(bars)}</svg>'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th{_class(value)}>{escape(name)}</th>" for name, value in rows[0].items())
    body = "".join(f"<tr>{''.join(f'<td{_class(one)}>{_cell(one)}</td>' for one in row.values())}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _class(value: Any) -> str:
    return "" if isinstance(value, str) else ' class="number"'


def _cell(value: Any) -> str:
    return escape(value) if isinstance(value, str) else f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
