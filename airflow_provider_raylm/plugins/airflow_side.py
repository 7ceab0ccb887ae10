"""What the Engines page takes from Airflow: who asks, what he may do, which connections and runs there are.

The page runs in the API server, which has Airflow's database; nothing else of this package may use it.
"""

# ruff: noqa: AIR311, TID251 - the database's own classes: a plugin in the API server has no task to ask through.

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import ConnectionDetails, DagAccessEntity, DagDetails
from airflow.models import Connection, DagModel, DagRun, Log
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_provider_raylm.compat import conf
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.operators.owners import installation
from airflow_provider_raylm.plugins.views import Owner, Viewer
from airflow_provider_raylm.specs import Labels

_VARIABLE = "AIRFLOW_CONN_"


@dataclass(frozen=True)
class StoredConnection:
    """A connection as ``client_of`` takes it, without the database behind it; *unreadable*: it cannot be decrypted."""

    conn_id: str
    host: str | None
    port: int | None
    schema: str | None
    password: str | None = field(repr=False)
    extra: str | None = field(repr=False)
    extra_dejson: dict[str, Any] = field(repr=False)
    team_name: str | None = None
    unreadable: bool = False


def connections() -> dict[str, StoredConnection]:
    """Return the connections of this package's type, by id: those of the database and of the environment.

    The latter win, as for tasks. A secrets backend cannot be asked which connections it has.
    """
    with create_session() as session:
        mine = select(Connection.conn_id).where(Connection.conn_type == RayLMHook.conn_type)
        found = [_read(session, conn_id) for conn_id in session.scalars(mine).all()]
    return {one.conn_id: one for one in (*found, *_of_the_environment())}


def _of_the_environment() -> Iterator[StoredConnection]:
    for name, value in os.environ.items():
        if not name.startswith(_VARIABLE) or RayLMHook.conn_type not in value:
            continue
        conn_id = name.removeprefix(_VARIABLE).lower()
        # Airflow's own words about one that cannot be read may quote it.
        with suppress(Exception):
            is_json = value.lstrip().startswith("{")
            made = Connection.from_json(value, conn_id) if is_json else Connection(conn_id=conn_id, uri=value)
            if made.conn_type == RayLMHook.conn_type:
                yield _stored(made)


def _read(session: Any, conn_id: str) -> StoredConnection:
    try:
        return _stored(session.scalars(select(Connection).where(Connection.conn_id == conn_id)).one())
    except Exception:
        # Another key has encrypted it, which Airflow finds when it loads it: trouble with this one alone. Whose it is
        # cannot be told either.
        return StoredConnection(conn_id, None, None, None, None, None, {}, unreadable=True)


def _stored(row: Any) -> StoredConnection:
    about = (row.conn_id, row.host, row.port, row.schema, row.password, row.extra, row.extra_dejson)
    return StoredConnection(*about, team_name=getattr(row, "team_name", None))


def this_installation() -> str | None:
    """Return the name of this Airflow, or None when it has none."""
    with suppress(SpecError):
        return installation()
    return None


def runs_of(owners: Collection[Labels]) -> dict[Owner, str]:
    """Return the state of each owner's run, of those that there are."""
    wanted = {(labels.dag_id, labels.run_id) for labels in owners}
    if not wanted:
        return {}
    with create_session() as session:
        rows = session.execute(
            select(DagRun.dag_id, DagRun.run_id, DagRun.state).where(
                DagRun.dag_id.in_({dag_id for dag_id, _ in wanted}), DagRun.run_id.in_({run_id for _, run_id in wanted})
            )
        ).all()
    return {(row.dag_id, row.run_id): str(row.state) for row in rows if (row.dag_id, row.run_id) in wanted}


def viewer_of(
    user: Any, connection: StoredConnection, owners: Iterable[Labels], borrowers: Collection[str] = ()
) -> Viewer:
    """Return what *user* may see and do with the engines of *owners*, which the DAGs *borrowers* may work on."""
    labels = tuple(owners)
    mine = this_installation()
    own = {one.dag_id for one in labels if one.installation == mine}
    return Viewer(
        installation=mine,
        dags={dag_id for dag_id in own.union(borrowers) if may_with_runs(user, "GET", dag_id)},
        editable={dag_id for dag_id in own if may_with_runs(user, "PUT", dag_id)},
        reads_connection=may_with_connection(user, "GET", connection),
        edits_connection=may_with_connection(user, "PUT", connection),
        runs=runs_of([one for one in labels if one.installation == mine]),
    )


def may_with_runs(user: Any, method: Any, dag_id: str) -> bool:
    """Return whether *user* may read (GET) or change (PUT) the runs of a DAG."""
    team = DagModel.get_team_name(dag_id) if conf.getboolean("core", "multi_team", fallback=False) else None
    details = DagDetails(id=dag_id, team_name=team)
    manager: Any = get_auth_manager()
    return bool(manager.is_authorized_dag(method=method, access_entity=DagAccessEntity.RUN, details=details, user=user))


def may_with_connection(user: Any, method: Any, connection: StoredConnection) -> bool:
    """Return whether *user* may read (GET) or change (PUT) a connection."""
    details = ConnectionDetails(conn_id=connection.conn_id, team_name=connection.team_name)
    manager: Any = get_auth_manager()
    return bool(manager.is_authorized_connection(method=method, details=details, user=user))


def may_see(user: Any, connection: StoredConnection) -> bool:
    """Return whether *user* is shown a connection: one of a team only if he may read it."""
    return connection.team_name is None or may_with_connection(user, "GET", connection)


def note_stop(user: Any, conn_id: str, labels: Labels, application: str, job: str) -> None:
    """Write into Airflow's audit log who stopped which engine."""
    extra = json.dumps({"connection": conn_id, "application": application, "job": job})
    name = user.get_name()
    with create_session() as session:
        session.add(
            Log(
                event="raylm_stop_engine",
                task_instance=None,
                owner=name,
                owner_display_name=name,
                extra=extra,
                dag_id=labels.dag_id,
                run_id=labels.run_id,
            )
        )
