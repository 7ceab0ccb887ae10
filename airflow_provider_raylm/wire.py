"""What travels between an Airflow worker and the Ray job it started: a request in, lines and one outcome out.

The request is JSON in the job's environment, because a command line would go through a shell. The outcome is one
sentinel line of the job's log. Both sides import this module, so it needs neither httpx nor ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from airflow_provider_raylm import __version__
from airflow_provider_raylm.errors import ClusterError, from_wire, to_wire

REQUEST_VARIABLE = "RAYLM_REQUEST"
NAMESPACE_VARIABLE = "RAY_NAMESPACE"
RESULT_SENTINEL = "RAYLM-RESULT "
ERROR_SENTINEL = "RAYLM-ERROR "

SAID = "raylm: "
"""Begins every line that a job prints for the task's log; any other line is noise of the libraries below."""


def said_line(words: str) -> str:
    """Return *words* as one line for the task's log, whatever is in them."""
    return SAID + " ".join(words.splitlines())


def result_line(result: Mapping[str, Any]) -> str:
    """Return a job's result, JSON values, as the line that ``outcome`` finds."""
    # ASCII: the JSON of pydantic leaves characters in strings at which a log is cut into lines, such as U+2028.
    return RESULT_SENTINEL + json.dumps(result)


def error_line(error: BaseException) -> str:
    """Return a job's error as the line that ``outcome`` finds."""
    return ERROR_SENTINEL + json.dumps(to_wire(error))


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
