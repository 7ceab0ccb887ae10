"""What the commands print: tables and lines, with nothing in them that a terminal would obey."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Of a line that goes to a file or another program; on a terminal its own width counts.
_PIPED_WIDTH = 200
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def say(line: str = "") -> None:
    """Print a line, whatever is in it."""
    _console().print(Text(safe(line)), soft_wrap=True)


def complain(line: str) -> None:
    """Print a line to stderr."""
    sys.stderr.write(f"{safe(line)}\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; long cells continue in the next line."""
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in made.columns:
        column.overflow = "fold"
    for row in rows:
        made.add_row(*(Text(safe(str(cell))) for cell in row))
    _console().print(made)


def safe(text: str) -> str:
    """Return *text* without what moves a cursor, sets a title or hides a word: rows and answers are anybody's text."""
    return "".join(one if one.isprintable() or one == "\n" else "\N{REPLACEMENT CHARACTER}" for one in _spaced(text))


def cut(text: str, most: int) -> str:
    """Return *text* in one line of *most* characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < _DAY:
        return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:.0f} min"
    return f"{seconds // _DAY:.0f} d {seconds % _DAY // _HOUR:.0f} h"


def _spaced(text: str) -> str:
    return text.replace("\t", "    ")


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
