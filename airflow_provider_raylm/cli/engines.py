"""``raylm engines``: who holds which engine on which cluster, and a way to end one that nobody needs any more."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from airflow_provider_raylm.cli.connections import connection_ids, of_each, opened
from airflow_provider_raylm.cli.console import choice, complain, duration, say, table
from airflow_provider_raylm.cli.jobs import run_verb
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.inventory import SeenEngine
from airflow_provider_raylm.specs import TeardownReport, build

COLUMNS = ("CONNECTION", "ENGINE", "DAG", "RUN", "MODEL", "STATUS", "REPLICAS", "AGE")
_DRAIN_TIMEOUT_S = 600.0
# A deletion is waited for five minutes; the job has to start before, and its package to be uploaded.
_TEARDOWN_S = 900.0

Found = list[tuple[str, SeenEngine]]


def run(arguments: argparse.Namespace) -> int:
    """List engines, or stop one; 1 if a cluster did not answer, or nothing was stopped."""
    conn_ids = connection_ids(arguments.conn)
    found, silent = _look(conn_ids)
    if arguments.action == "stop":
        return _stop(arguments, found, silent)
    if found:
        table(COLUMNS, [_row(conn_id, engine, time.time()) for conn_id, engine in found])
    elif len(silent) < len(conn_ids):
        say("no engines")
    return 1 if silent else 0


def _look(conn_ids: Sequence[str]) -> tuple[Found, list[str]]:
    """Return the engines by connection, and the connections that did not answer, having said so."""
    found: Found = []
    silent = []
    for conn_id, answer in of_each(conn_ids, lambda jobs: jobs.all_engines()):
        if isinstance(answer, Exception):
            complain(f"{conn_id}: {answer}")
            silent.append(conn_id)
        else:
            found += [(conn_id, engine) for engine in answer]
    return found, silent


def _row(conn_id: str, engine: SeenEngine, now: float) -> tuple[str, ...]:
    ref = engine.ref
    return (
        conn_id,
        ref.application,
        ref.labels.dag_id,
        ref.labels.run_id,
        ref.model,
        engine.status,
        f"{engine.running}/{engine.wanted}",
        duration(max(now - ref.deployed_at, 0.0)) if ref.deployed_at else "?",
    )


def _stop(arguments: argparse.Namespace, found: Found, silent: Sequence[str]) -> int:
    conn_id, engine = _named(arguments.name, found, silent)
    if not arguments.yes and not _agreed(conn_id, engine):
        complain("nothing was stopped")
        return 1
    payload = {
        "application": engine.ref.application,
        "on_busy": arguments.on_busy,
        "drain_timeout": _DRAIN_TIMEOUT_S if arguments.on_busy == "wait" else 0.0,
    }
    with opened(conn_id) as jobs:
        result = run_verb(jobs, "teardown", payload, timeout=_TEARDOWN_S + payload["drain_timeout"])
    report = build(TeardownReport, result)
    if not report.existed:
        say(f"{report.application} was gone already")
        return 0
    say(
        f"{report.application} is gone after {duration(report.engine_seconds)}: {report.usage.requests} rows, "
        f"{report.usage.completion_tokens} generated tokens"
    )
    if not report.resources_free:
        complain("What it held is not free yet; the list shows when it is.")
    return 0


def _named(name: str, found: Found, silent: Sequence[str]) -> tuple[str, SeenEngine]:
    """Return the one engine of that name.

    Raises:
        EngineError: there is none, or several.
    """
    # Two connections may lead to one cluster; and two clusters may have an engine of the same application.
    fitting = {
        (engine.ref.application, engine.ref.deployed_at): (conn_id, engine)
        for conn_id, engine in reversed(found)
        if name in (engine.ref.application, engine.ref.labels.engine)
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        several = sorted(f"{engine.ref.application} (--conn {conn_id})" for conn_id, engine in fitting.values())
        raise EngineError(
            f"{len(fitting)} engines are named {name!r}. Stop one by its application, on its cluster: "
            f"{', '.join(several)}."
        )
    there = choice(name, (engine.ref.application for _, engine in found))
    unknown = f" {', '.join(silent)} did not answer." if silent else ""
    raise EngineError(f"There is no engine named {name!r}; there are: {there}.{unknown}")


def _agreed(conn_id: str, engine: SeenEngine) -> bool:
    """Ask whether to tear the engine down.

    Raises:
        EngineError: nobody can answer.
    """
    if not sys.stdin.isatty():
        raise EngineError(f"Nobody is there to be asked whether to stop {engine.ref.application}: say --yes.")
    table(COLUMNS, [_row(conn_id, engine, time.time())])
    say("Tear it down? Tasks of its run that have not ended fail then. [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
