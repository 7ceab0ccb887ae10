"""What travels between an Airflow worker and the Ray job it started: a request in, lines and one outcome out.

The request is JSON in the job's environment, because a command line would go through a shell. The outcome is one
sentinel line of the job's log. Both sides import this module, so it needs neither httpx nor ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from airflow_provider_raylm import __version__
from airflow_provider_raylm.errors import ClusterError, SpecError, from_wire, to_wire
from airflow_provider_raylm.specs import Progress

REQUEST_VARIABLE = "RAYLM_REQUEST"
NAMESPACE_VARIABLE = "RAY_NAMESPACE"
HANDED_VARIABLE = "RAYLM_HANDED"
"""Names the place where a job finds what is in none of its variables."""
RESULT_SENTINEL = "RAYLM-RESULT "
ERROR_SENTINEL = "RAYLM-ERROR "

_SAID = re.compile(r"raylm (\d+): (.*)")
_PROGRESS = re.compile(r"raylm (\d+|-) progress: (\{.*\})")
# Ray writes the beginning of a package that it cannot store into its log.
_HANDED = b"raylm, for one job alone\n"


def said_line(number: int, words: str) -> str:
    """Return *words* as one line for the task's log, whatever is in them.

    Args:
        number: 1 for the first line that the job says, 2 for the next: who has the end of a log knows whether it is all
            that is new.
        words: what is said.
    """
    return f"raylm {number}: {' '.join(words.splitlines())}"


def progress_line(number: int | None, progress: Progress) -> str:
    """Return progress as one line: the record for machines, which ``said`` turns into the line for people.

    Args:
        number: as for ``said_line``; None for a record that does not go into the task's log.
        progress: the record.
    """
    return f"raylm {'-' if number is None else number} progress: {json.dumps(progress.model_dump(mode='json'))}"


def said(log: str) -> dict[int, str]:
    """Return what a job said in (the end of) its log, by number; any other line is noise of the libraries below."""
    lines = _complete(log)
    words = {int(match[1]): match[2] for match in map(_SAID.fullmatch, lines) if match}
    return words | {number: record.line() for number, record in _records(lines) if number is not None}


def progress_in(log: str) -> tuple[Progress, ...]:
    """Return the progress that a job told in (the end of) its log, the oldest first."""
    return tuple(record for _, record in _records(_complete(log)))


def _complete(log: str) -> list[str]:
    # A line that is not complete yet is left for the next look.
    return log[: log.rfind("\n") + 1].splitlines()


def _records(lines: list[str]) -> Iterator[tuple[int | None, Progress]]:
    for match in map(_PROGRESS.fullmatch, lines):
        # Where two processes wrote at a time, what is between two braces is no record.
        with suppress(ValueError, SpecError):
            if match:
                yield None if match[1] == "-" else int(match[1]), Progress.model_validate(json.loads(match[2]))


def handed(storage: Mapping[str, Any]) -> bytes:
    """Return options of file systems as a job takes them over, which says who they are for and nothing else first."""
    return _HANDED + json.dumps(storage).encode()


def taken(content: bytes) -> dict[str, Any]:
    """Return what ``handed`` was given."""
    storage: dict[str, Any] = json.loads(content.removeprefix(_HANDED))
    return storage


def result_line(result: Mapping[str, Any]) -> str:
    """Return a job's result, JSON values, as the line that ``outcome`` finds."""
    # ASCII: the JSON of pydantic leaves characters in strings at which a log is cut into lines, such as U+2028.
    return RESULT_SENTINEL + json.dumps(result)


def error_line(error: BaseException) -> str:
    """Return a job's error as the line that ``outcome`` finds."""
    return ERROR_SENTINEL + json.dumps(to_wire(error))


def has_outcome(log: str) -> bool:
    """Return whether a job's log holds its outcome."""
    return any(line.startswith((RESULT_SENTINEL, ERROR_SENTINEL)) for line in log.splitlines())


def outcome(log: str, message: str = "") -> dict[str, Any]:
    """Return the result that a job's log ends with.

    Args:
        log: all that the job printed.
        message: Ray's own sentence about the job's end, for a job that could not even start.

    Raises:
        RayLMError: the error that the job reported, of the class it had there.
        ClusterError: the job ended without a word; the last lines are in the message.
    """
    for line in reversed(log.splitlines()):
        if line.startswith(RESULT_SENTINEL):
            result: dict[str, Any] = json.loads(line.removeprefix(RESULT_SENTINEL))
            return result
        if line.startswith(ERROR_SENTINEL):
            raise from_wire(json.loads(line.removeprefix(ERROR_SENTINEL)))
    if "No module named" in log and "airflow_provider_raylm" in log:
        raise ClusterError(
            f"The cluster does not have the package airflow-provider-raylm (this worker has {__version__}). Install "
            f"it there (pip install --no-deps airflow-provider-raylm=={__version__}), or let the connection ship it "
            '(extra {"ship_package": true}).'
        )
    words = "\n".join(log.splitlines()[-15:]) or message or "(nothing)"
    raise ClusterError(f"The job ended without a result. Its last words:\n{words}")
