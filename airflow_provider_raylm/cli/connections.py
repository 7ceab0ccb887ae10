"""Which clusters there are: the raylm connections that Airflow can list, and a client of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TypeVar

from airflow.sdk import BaseHook

from airflow_provider_raylm import local
from airflow_provider_raylm.cli.console import complain
from airflow_provider_raylm.compat import AirflowException
from airflow_provider_raylm.errors import ClusterError, RayLMError
from airflow_provider_raylm.hooks.raylm import DEFAULT_PORT, LOCAL_HOST, RayLMHook
from airflow_provider_raylm.ray_jobs import RayJobs

_VARIABLE = "AIRFLOW_CONN_"
_AT_A_TIME = 8

Found = TypeVar("Found")


def connection_ids(given: Sequence[str] | None) -> list[str]:
    """Return the connections to look at: those given, else those of type raylm in environment and database.

    A secrets backend cannot be listed: a connection that is only there has to be named.

    Raises:
        ClusterError: there is none.
    """
    if given:
        return list(dict.fromkeys(given))
    variables = [name.removeprefix(_VARIABLE).lower() for name in os.environ if name.startswith(_VARIABLE)]
    ids = sorted({*filter(_is_raylm, variables), *_in_database()})
    if not ids and not _is_raylm(RayLMHook.default_conn_name):
        raise ClusterError(
            "Airflow lists no connection of type raylm. Make one, or name one that is in a secrets backend: "
            "--conn CONN_ID."
        )
    return ids or [RayLMHook.default_conn_name]


def _is_raylm(conn_id: str) -> bool:
    try:
        return bool(BaseHook.get_connection(conn_id).conn_type == RayLMHook.conn_type)
    # Of another kind, and none that Airflow can read: not ours to complain about.
    except Exception:
        return False


def _in_database() -> list[str]:
    from airflow.models.connection import Connection  # noqa: TID251 - the SDK lists none
    from airflow.utils.session import create_session
    from sqlalchemy import select
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with create_session() as session:
            chosen = select(Connection.conn_id).where(Connection.conn_type == RayLMHook.conn_type)
            return [str(one) for one in session.scalars(chosen)]
    except SQLAlchemyError as error:
        why = str(error).splitlines()[0]
        complain(f"Airflow's database does not answer, so its connections are not looked at ({why}).")
        return []


@contextmanager
def opened(conn_id: str) -> Iterator[RayJobs]:
    """Yield a client of a connection's cluster.

    Raises:
        RayLMError: the connection cannot work.
    """
    with closing(RayLMHook(conn_id).get_conn()) as jobs:
        yield jobs


def of_each(conn_ids: Sequence[str], ask: Callable[[RayJobs], Found]) -> Iterator[tuple[str, Found | Exception]]:
    """Ask several clusters side by side, and yield what each answers, in order; one that does not hides no other.

    A local cluster that is not up is not started for that.
    """

    def asked(conn_id: str) -> Found | Exception:
        try:
            _require_up(conn_id)
            with opened(conn_id) as jobs:
                return ask(jobs)
        except (RayLMError, AirflowException) as error:
            return error

    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="raylm-ask") as pool:
        yield from zip(conn_ids, pool.map(asked, conn_ids), strict=True)


def _require_up(conn_id: str) -> None:
    connection = None
    with suppress(AirflowException):
        connection = BaseHook.get_connection(conn_id)
    if connection is not None and connection.host == LOCAL_HOST and not local.is_up(connection.port or DEFAULT_PORT):
        raise ClusterError("no Ray head runs on this machine (raylm://local); the first task starts one.")
