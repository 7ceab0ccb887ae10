"""The console script ``raylm``: the commands of ``airflow raylm``, also where Airflow does not know them (3.1)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cli.commands import COMMANDS, HELP, call


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 when it failed or found something wrong, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="raylm", description=HELP)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_arguments(commands.add_parser(command.name, help=command.help, description=command.help))
    parsed = parser.parse_args(arguments)
    return call(next(command for command in COMMANDS if command.name == parsed.command), parsed)


if __name__ == "__main__":
    sys.exit(main())
