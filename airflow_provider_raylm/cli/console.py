"""What the commands print: tables and lines, with nothing in them that a terminal would obey."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Of a table that goes to a file or another program, which takes a row for a line; a terminal has a width of its own.
_PIPED_WIDTH = 10_000
# Of which words are made in Persian, in the scripts of India, and in families of emoji; they hide nothing.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
# Of those that an error offers.
_NAMES = 10
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def accept_any_text() -> None:
    """Let stdout write a question mark for what its encoding has no character for, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


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
        made.add_row(*(Text(safe(one_line(str(cell)))) for cell in row))
    _console().print(made)


def safe(text: str) -> str:
    """Return *text* without what moves a cursor, sets a title or hides a word: rows and answers are anybody's text."""
    return "".join(map(_harmless, text.replace("\t", "    ")))


def _harmless(one: str) -> str:
    if one.isprintable() or one == "\n" or one in _JOINERS:
        return one
    # Such as those that Japanese and French have between words.
    return " " if unicodedata.category(one) == "Zs" else "\N{REPLACEMENT CHARACTER}"


def one_line(text: str) -> str:
    """Return *text* in one line: a name of two would pass for two lines of the command's own."""
    return " ".join(text.split())


def cut(text: str, most: int) -> str:
    """Return *text* in one line of *most* characters at most."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def last_line(text: str) -> str:
    """Return where a traceback, or the error of an imported file, says what went wrong."""
    return (text.strip().splitlines() or ["no reason is told"])[-1]


def choice(wanted: str, there: Iterable[str]) -> str:
    """Return which names there are in place of one that is not, the nearest first, and no more than help."""
    names = list(dict.fromkeys(there))
    names = list(dict.fromkeys([*get_close_matches(wanted, names, _NAMES), *names]))
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return f"{', '.join(names[:_NAMES]) or 'none'}{more}"


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < _DAY:
        return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:.0f} min"
    return f"{seconds // _DAY:.0f} d {seconds % _DAY // _HOUR:.0f} h"


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
