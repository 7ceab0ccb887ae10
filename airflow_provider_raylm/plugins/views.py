"""From what a cluster shows to what the page shows: who owns an engine, who works on it, what it costs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from airflow_provider_raylm.inventory import SeenEngine, SeenJob
from airflow_provider_raylm.plugins.watching import Look, is_at_work
from airflow_provider_raylm.specs import EngineRef, Labels, Progress

# Rates are those of the last minute.
RATE_OVER_S = 60.0
ALIVE = ("queued", "running")

Owner = tuple[str, str]
OwnerState = Literal["alive", "over", "gone", "command", "elsewhere", "hidden"]


@dataclass(frozen=True)
class Viewer:
    """What somebody may see and do, and what Airflow knows of the runs.

    Attributes:
        installation: name of this Airflow; None when it has none.
        dags: those whose runs he may read, of the DAGs that have engines or tasks at work.
        editable: those whose runs he may change.
        reads_connection: whether he may read the connection.
        edits_connection: whether he may change it.
        runs: state of each run that there is, by (dag_id, run_id).
    """

    installation: str | None
    dags: Collection[str]
    editable: Collection[str]
    reads_connection: bool
    edits_connection: bool
    runs: Mapping[Owner, str]

    def owner(self, labels: Labels) -> OwnerState:
        """Return how an engine's owner stands; a DAG that he may not read is hidden.

        Of another installation's DAGs this one's permissions say nothing: who may read the connection sees them.
        """
        if labels.installation != self.installation:
            return "elsewhere" if self.reads_connection else "hidden"
        if labels.dag_id not in self.dags:
            return "hidden"
        if labels.of_a_command:
            return "command"
        state = self.runs.get((labels.dag_id, labels.run_id))
        return "gone" if state is None else "alive" if state in ALIVE else "over"

    def sees(self, job: SeenJob, labels: Labels) -> bool:
        """Return whether he is told the names of a job on the engine of *labels*, which may be lent to another DAG."""
        owner = self.owner(labels)
        return owner == "elsewhere" or (owner != "hidden" and job.info.metadata.get("dag_id") in self.dags)

    def may_stop(self, labels: Labels) -> bool:
        """Return whether he may stop an engine: never another installation's."""
        own = labels.installation == self.installation
        return own and (labels.dag_id in self.editable or self.edits_connection)


class TaskView(BaseModel):
    """A task at work on an engine."""

    job: str
    dag_id: str | None
    run_id: str | None
    task_id: str | None
    map_index: int | None
    status: str
    message: str
    seconds: float | None
    rows: int | None = None
    total: int | None = None
    rows_per_s: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    failures: dict[str, int] = {}
    told_at: float | None = None


class EngineView(BaseModel):
    """An engine."""

    application: str
    name: str | None
    model: str
    kind: str
    status: str
    message: str
    owner: OwnerState
    dag_id: str | None
    run_id: str | None
    run_state: str | None
    replicas_running: int
    replicas_wanted: int
    replicas_max: int
    age: float | None
    lease_left: float | None
    lease_bound: Literal["idle_timeout", "max_lifetime"] | None
    gpus: float
    gpu_seconds: float | None
    gpu_seconds_at_least: bool
    cost: float | None
    stopping: bool
    may_stop: bool
    tasks: list[TaskView]


class ConnectionView(BaseModel):
    """A connection, and the engines on its cluster."""

    conn_id: str
    state: str
    trouble: str
    seen_at: float | None
    dashboard_url: str
    price_per_gpu_hour: float | None
    engines: list[EngineView]


def connection_view(conn_id: str, look: Look, price: float | None, viewer: Viewer, now: float) -> ConnectionView:
    """Return a connection as the page shows it, the engines that need somebody first. *now*: Unix seconds."""
    jobs: dict[str | None, list[SeenJob]] = {}
    for job in look.jobs:
        jobs.setdefault(job.application, []).append(job)
    engines = [
        engine_view(engine, jobs.get(engine.ref.application, []), look, price, viewer, now) for engine in look.engines
    ]
    return ConnectionView(
        conn_id=conn_id,
        state=look.state,
        trouble=look.trouble,
        seen_at=look.at or None,
        dashboard_url=look.dashboard_url,
        price_per_gpu_hour=price,
        engines=sorted(engines, key=lambda one: (one.owner not in ("over", "gone"), -(one.age or 0.0))),
    )


def engine_view(
    engine: SeenEngine, mine: Sequence[SeenJob], look: Look, price: float | None, viewer: Viewer, now: float
) -> EngineView:
    """Return an engine, and *mine*, the jobs that concern it, as the page shows them to *viewer*."""
    ref = engine.ref
    labels = ref.labels
    owner = viewer.owner(labels)
    shown = owner != "hidden"
    working = [job for job in mine if job.verb == "infer" and is_at_work(job)]
    left, bound = lease_left(engine, mine, now)
    spent, at_least = gpu_seconds(engine, now)
    return EngineView(
        application=ref.application if shown else "",
        name=labels.engine if shown else None,
        model=ref.model,
        kind=ref.task,
        status=engine.status,
        message=engine.message if shown else "",
        owner=owner,
        dag_id=labels.dag_id if shown else None,
        run_id=labels.run_id if shown else None,
        run_state=viewer.runs.get((labels.dag_id, labels.run_id)) if owner in ("alive", "over") else None,
        replicas_running=engine.running,
        replicas_wanted=engine.wanted,
        replicas_max=ref.replicas,
        age=_age(ref, now),
        lease_left=left,
        lease_bound=bound,
        gpus=ref.gpus_per_replica * engine.wanted,
        gpu_seconds=spent,
        gpu_seconds_at_least=at_least,
        cost=spent / 3600 * price if spent is not None and price is not None else None,
        stopping=is_stopping(engine, mine),
        may_stop=shown and viewer.may_stop(labels),
        tasks=[
            task_view(job, look.histories.get(job.submission_id, ()), viewer.sees(job, labels), now) for job in working
        ],
    )


def is_stopping(engine: SeenEngine, jobs: Sequence[SeenJob]) -> bool:
    """Return whether an engine is going, or a teardown of it is at work or waits to start."""
    return engine.status == "DELETING" or any(job.verb == "teardown" and is_at_work(job) for job in jobs)


def lease_left(
    engine: SeenEngine, jobs: Sequence[SeenJob], now: float
) -> tuple[float | None, Literal["idle_timeout", "max_lifetime"] | None]:
    """Return the seconds until an engine deletes itself if nothing changes, and which bound does it.

    Its idle time begins anew while a task works, and when the last of its jobs ends; before it is up there is none.
    """
    ref = engine.ref
    if not ref.deployed_at:
        return None, None
    life = max(ref.deployed_at + ref.lease.max_lifetime - now, 0.0)
    if engine.status == "DEPLOYING":
        return life, "max_lifetime"
    renewing = [job for job in jobs if job.verb in ("deploy", "infer", "preview")]
    working = any(map(is_at_work, renewing))
    ended = [job.ended_at for job in renewing if job.ended_at]
    idle_since = now if working else max([ref.deployed_at, *ended])
    idle = max(idle_since + ref.lease.idle_timeout - now, 0.0)
    return (idle, "idle_timeout") if idle < life else (life, "max_lifetime")


def gpu_seconds(engine: SeenEngine, now: float) -> tuple[float | None, bool]:
    """Return how long GPUs were held so far, in seconds of one GPU, and whether it may have been longer.

    An engine of a fixed size holds its GPUs from its deployment on. Of one that autoscales Serve knows the replicas
    that live now, not those that came and went.
    """
    each = engine.ref.gpus_per_replica
    if engine.autoscales:
        return each * sum(max(now - started, 0.0) for started in engine.started_at), True
    age = _age(engine.ref, now)
    return (None if age is None else each * engine.ref.replicas * age), False


def task_view(job: SeenJob, history: Sequence[Progress], shown: bool, now: float) -> TaskView:
    """Return a task at work; its names only if *shown*."""
    told = job.info.metadata if shown else {}
    submitted = job.info.submitted_at
    last = history[-1] if history else None
    view = TaskView(
        job=job.submission_id if shown else "",
        dag_id=told.get("dag_id"),
        run_id=told.get("run_id"),
        task_id=told.get("task_id"),
        map_index=_index(told.get("map_index")),
        status=job.info.status,
        message=job.info.message if shown and not job.info.started else "",
        seconds=max(now - submitted, 0.0) if submitted else None,
    )
    if last is None:
        return view
    rows, tokens = rates(history)
    left = None if last.total is None else max(last.total - last.rows, 0)
    return view.model_copy(
        update={
            "rows": last.rows,
            "total": last.total,
            "rows_per_s": rows,
            "tokens_per_s": tokens,
            "seconds_left": left / rows if left is not None and rows else None,
            # How many failed anybody may know, of what only who sees the task.
            "failures": last.failures if shown else {"failed": last.failed} if last.failed else {},
            "told_at": last.at,
        }
    )


def rates(history: Sequence[Progress]) -> tuple[float, float]:
    """Return rows and tokens per second over the last minute; over the whole attempt where there is one record."""
    last = history[-1]
    begin = next(record for record in history if record.at >= last.at - RATE_OVER_S)
    seconds = last.at - begin.at
    if seconds <= 0:
        return last.rows_per_s, last.tokens_per_s
    return (last.rows - begin.rows) / seconds, (last.completion_tokens - begin.completion_tokens) / seconds


def _age(ref: EngineRef, now: float) -> float | None:
    return max(now - ref.deployed_at, 0.0) if ref.deployed_at else None


def _index(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
