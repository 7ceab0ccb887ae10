"""Which commands there are, and their arguments, for argparse and for Airflow, which imports this on each call."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.cli.cli_config import CLICommand

# By which Airflow tells its own processes from tasks.
_PROCESS = "_AIRFLOW_PROCESS_CONTEXT"
HELP = "Look at inference tasks before they run, at engines, and at failed rows"


@dataclass(frozen=True)
class Command:
    """One command; ``run`` in the module of its name does the work and returns the exit status.

    Attributes:
        name: its name.
        help: one sentence.
        add_arguments: gives a parser its arguments.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def _engines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--conn",
        action="append",
        metavar="CONN_ID",
        help="a raylm connection, several times for several; default: all that Airflow lists",
    )
    actions = parser.add_subparsers(dest="action", metavar="stop")
    stop = actions.add_parser("stop", help="tear an engine down")
    stop.add_argument("name", metavar="NAME", help="the application, as the list has it, or the engine's own name")
    # Without a default: it would replace what stands before `stop`.
    stop.add_argument("--conn", action="append", metavar="CONN_ID", default=argparse.SUPPRESS, help="where to look")
    stop.add_argument("--yes", action="store_true", help="do not ask")
    stop.add_argument(
        "--on-busy",
        choices=["fail", "wait", "delete"],
        default="fail",
        help="while tasks work on it: fail (default), wait at most ten minutes, or delete it under them",
    )


def _quarantine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the output of a task, or its quarantine: any address of fsspec's")
    parser.add_argument("--examples", type=_at_least(0), default=3, metavar="N", help="rows per reason (default: 3)")
    parser.add_argument(
        "--storage-conn", action="append", default=[], metavar="CONN_ID", help="Airflow connection to the storage"
    )


def _validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a folder of DAGs, or one file")
    parser.add_argument(
        "--storage", action="store_true", help="look at each source, too, by a job on the task's cluster; no engine"
    )
    parser.add_argument("--conn", metavar="CONN_ID", help="the cluster of these jobs; default: each task's own")


def _task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dag_id", metavar="DAG_ID")
    parser.add_argument("task_id", metavar="TASK_ID", help="an inference task")
    parser.add_argument("--dags-folder", metavar="FOLDER", help="where the DAG is; default: Airflow's own folder")
    parser.add_argument("--conf", metavar="JSON", type=_json_object, default={}, help="the run's conf")
    parser.add_argument("--logical-date", metavar="DATE", type=_date, help="the run's, ISO 8601; default: now")
    parser.add_argument(
        "--map-index", type=_at_least(0), default=0, metavar="N", help="which instance of a mapped task"
    )
    parser.add_argument(
        "--xcom", metavar="TASK_ID=JSON", type=_xcom, action="append", default=[], help="what a task before it returns"
    )
    parser.add_argument("--source", metavar="URI", action="append", help="other files in place of the task's source")
    parser.add_argument("--conn", metavar="CONN_ID", help="the cluster; default: the task's own connection")
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="an engine that runs, by its application or its name, or `temporary`: one is deployed for this, and torn "
        "down; default: the one that runs for the DAG",
    )


def _preview(parser: argparse.ArgumentParser) -> None:
    _task(parser)
    parser.add_argument(
        "--rows", type=_at_least(1), default=10, metavar="N", help="how many, at most 100 (default: 10)"
    )
    parser.add_argument("--full", action="store_true", help="do not cut texts to a few lines")


def _estimate(parser: argparse.ArgumentParser) -> None:
    _task(parser)
    parser.add_argument(
        "--sample", type=_at_least(2), default=50, metavar="N", help="rows to ask, at most 100; default: 50"
    )
    parser.add_argument("--no-engine", action="store_true", help="ask no row: only what the plan of the source tells")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _xcom(text: str) -> tuple[str, Any]:
    task_id, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError("there is no =")
        return task_id, json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no TASK_ID=JSON: {error}") from None


def _date(text: str) -> datetime:
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


COMMANDS = (
    Command("estimate", "Say what an inference task will take, from a sample of its rows", _estimate),
    Command("validate", "Check the specs of all inference tasks and engines of a folder", _validate),
    Command("preview", "Ask an inference task's first rows, and write nothing", _preview),
    Command("engines", "List the engines on the clusters of raylm connections, or stop one", _engines),
    Command("quarantine", "Show why rows failed, with examples, and how to ask them again", _quarantine),
)


def call(command: Command, arguments: argparse.Namespace) -> int:
    """Run a command and return its exit status; an error that it expects is one sentence on stderr."""
    from airflow_provider_raylm.cli.console import accept_any_text, complain
    from airflow_provider_raylm.compat import AirflowException
    from airflow_provider_raylm.errors import RayLMError

    accept_any_text()
    try:
        with _as_airflows_own():
            status: int = import_module(f"airflow_provider_raylm.cli.{command.name}").run(arguments)
    except (RayLMError, AirflowException) as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    return status


@contextmanager
def _as_airflows_own() -> Iterator[None]:
    """Let the body find connections in Airflow's database, as Airflow's own commands do; tasks ask the API server."""
    before = os.environ.get(_PROCESS)
    os.environ[_PROCESS] = "server"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PROCESS]
        else:
            os.environ[_PROCESS] = before


def airflow_commands() -> list[CLICommand]:
    """Return the commands as Airflow takes them from a provider's ``cli``, from 3.2 on."""
    from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand

    class Arguments(Arg):
        """All arguments of a command: argparse adds them, as in the console script."""

        def __init__(self, command: Command) -> None:
            super().__init__(flags=(command.name,))  # type: ignore[no-untyped-call]
            self._command = command

        def add_to_parser(self, parser: argparse.ArgumentParser) -> None:
            self._command.add_arguments(parser)

    def function(command: Command) -> Callable[[argparse.Namespace], None]:
        def run(arguments: Any) -> None:
            # Airflow does nothing with what a command returns.
            sys.exit(call(command, arguments))

        return run

    actions = [ActionCommand(one.name, one.help, function(one), (Arguments(one),)) for one in COMMANDS]
    return [GroupCommand("raylm", HELP, actions)]
