"""The Engines page behind Airflow's login: its files, what it polls, and the button that stops an engine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from airflow.api_fastapi.auth.managers.models.resource_details import AccessView
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_view
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel

from airflow_provider_raylm.errors import ClusterError, RayLMError, SpecError
from airflow_provider_raylm.hooks.raylm import client_of, extra_of
from airflow_provider_raylm.plugins import airflow_side
from airflow_provider_raylm.plugins.airflow_side import StoredConnection
from airflow_provider_raylm.plugins.stopping import stop_engine
from airflow_provider_raylm.plugins.views import ConnectionView, Viewer, connection_view
from airflow_provider_raylm.plugins.watching import REQUEST_S, Look, Watch, is_at_work
from airflow_provider_raylm.ray_jobs import RayJobs
from airflow_provider_raylm.specs import EngineRef, OnBusy, Progress

STATIC = Path(__file__).parent / "static"
# By the name in the address.
FILES = {"engines": "engines.html", "engines.js": "engines.js", "engines.css": "engines.css"}
# Nothing but the page's own files, and nobody but Airflow's own UI around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
NOT_TOLD = "Whoever may read the connection is told why."
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}

router = APIRouter(dependencies=[Depends(requires_access_view(AccessView.PLUGINS))])


class EnginesAnswer(BaseModel):
    """What the page polls; *at* is the server's clock, in Unix seconds."""

    at: float
    connections: list[ConnectionView]


class JobAnswer(BaseModel):
    """The progress of a job at work, the oldest record first."""

    history: list[Progress]


class StopRequest(BaseModel):
    """Which engine to stop, and what becomes of the tasks that work on it."""

    conn_id: str
    application: str
    on_busy: OnBusy = "wait"


class StopAnswer(BaseModel):
    """The job that stops it."""

    job: str


def make_app() -> FastAPI:
    """Return the page's application, with looks of its own."""
    app = FastAPI(title="Ray LM engines", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.watch = Watch()
    app.middleware("http")(_guarded)
    for name, file in FILES.items():
        app.add_route(f"/{name}", partial(_file, STATIC / file), methods=["GET"])
    app.include_router(router, prefix="/api")
    return app


async def _file(path: Path, request: Request) -> Response:
    return FileResponse(path)


async def _guarded(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call(request)
    for name, value in HEADERS.items():
        response.headers[name] = value
    # Files change with the package; answers with every look, and with whoever asks.
    response.headers["Cache-Control"] = "no-store" if "/api/" in request.url.path else "no-cache"
    return response


def _same_site(
    x_raylm_action: Annotated[str | None, Header()] = None, sec_fetch_site: Annotated[str | None, Header()] = None
) -> None:
    """Refuse a request that another site had the browser send.

    It cannot set a header of its own without asking first, which nobody here answers; and the browser says whose page
    it is. Airflow's cookie is not sent along from another site, either.
    """
    if x_raylm_action is None or sec_fetch_site not in (None, "same-origin"):
        raise HTTPException(status.HTTP_403_FORBIDDEN, "This request did not come from the Engines page.")


@router.get("/engines")
async def list_engines(request: Request, user: GetUserDep) -> EnginesAnswer:
    """Return every connection that the user may see, and the engines on its cluster."""
    watch: Watch = request.app.state.watch
    every = await run_in_threadpool(airflow_side.connections)
    watch.keep(every)
    seen = {conn_id: one for conn_id, one in every.items() if airflow_side.may_see(user, one)}
    looks = await watch.looks({conn_id: partial(connect, one) for conn_id, one in seen.items()})
    now = time.time()
    views = await run_in_threadpool(lambda: [_view(one, looks[name], user, now) for name, one in sorted(seen.items())])
    return EnginesAnswer(at=now, connections=views)


@router.get("/job")
async def show_job(request: Request, user: GetUserDep, conn_id: str, job: str) -> JobAnswer:
    """Return how an inference job at work has come along."""
    connection, look = await _look(request, user, conn_id)
    viewer = await run_in_threadpool(_viewer, connection, look, user)
    labels = {engine.ref.application: engine.ref.labels for engine in look.engines}
    for one in look.jobs:
        if one.submission_id == job and one.application in labels and viewer.sees(one, labels[one.application]):
            return JobAnswer(history=list(look.histories.get(job, ())))
    raise HTTPException(status.HTTP_404_NOT_FOUND, "This task is not at work any more.")


@router.post("/stop", dependencies=[Depends(_same_site)])
async def stop(request: Request, user: GetUserDep, body: StopRequest) -> StopAnswer:
    """Have an engine torn down."""
    connection, look = await _look(request, user, body.conn_id)
    for engine in look.engines:
        if engine.ref.application == body.application:
            job = await run_in_threadpool(_stop, user, connection, engine.ref, body.on_busy)
            request.app.state.watch.cluster(body.conn_id).expire()
            return StopAnswer(job=job)
    raise HTTPException(status.HTTP_404_NOT_FOUND, "This engine is not there any more.")


def _stop(user: Any, connection: StoredConnection, ref: EngineRef, on_busy: OnBusy) -> str:
    if not airflow_side.viewer_of(user, connection, [ref.labels]).may_stop(ref.labels):
        raise HTTPException(
            status.HTTP_403_FORBIDDEN,
            "To stop an engine you need the permission to change runs of its DAG, or the connection. Another Airflow's "
            "engine can be stopped there alone.",
        )
    try:
        job = stop_engine(partial(connect, connection), ref, on_busy)
    except RayLMError as error:
        raise HTTPException(status.HTTP_502_BAD_GATEWAY, str(error)) from None
    airflow_side.note_stop(user, connection.conn_id, ref.labels, ref.application, job)
    return job


async def _look(request: Request, user: Any, conn_id: str) -> tuple[StoredConnection, Look]:
    connection = await run_in_threadpool(_connection, user, conn_id)
    watch: Watch = request.app.state.watch
    return connection, (await watch.looks({conn_id: partial(connect, connection)}))[conn_id]


def connect(connection: StoredConnection) -> RayJobs:
    """Return a client of a connection's cluster; none is started for it.

    Raises:
        SpecError: the connection's extra has an unknown or bad field.
        ClusterError: it cannot be read, or has no host.
    """
    if connection.unreadable:
        raise ClusterError(
            f"The connection {connection.conn_id!r} cannot be decrypted: [core] fernet_key is not the one that it was "
            "stored with. Store it again, or rotate the keys."
        )
    return client_of(connection, start_local=False, timeout=REQUEST_S)


def _connection(user: Any, conn_id: str) -> StoredConnection:
    found = airflow_side.connections().get(conn_id)
    if found is None or not airflow_side.may_see(user, found):
        raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such connection to a Ray cluster.")
    return found


def _viewer(connection: StoredConnection, look: Look, user: Any) -> Viewer:
    engines = {engine.ref.application: engine.ref.labels for engine in look.engines}
    at_work = (job for job in look.jobs if job.application in engines and is_at_work(job))
    borrowers = {job.info.metadata.get("dag_id", "") for job in at_work}
    return airflow_side.viewer_of(user, connection, engines.values(), borrowers - {""})


def _view(connection: StoredConnection, look: Look, user: Any, now: float) -> ConnectionView:
    try:
        price = extra_of(connection).price_per_gpu_hour
    except (SpecError, ClusterError):
        # The look says what is wrong with the extra.
        price = None
    viewer = _viewer(connection, look, user)
    view = connection_view(connection.conn_id, look, price, viewer, now)
    if viewer.reads_connection:
        return view
    # Address and trouble are the connection's.
    return view.model_copy(update={"dashboard_url": "", "trouble": NOT_TOLD if view.trouble else ""})
