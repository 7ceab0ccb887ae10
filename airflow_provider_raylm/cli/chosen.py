"""Which engine a task is tried on: one that runs, or one that lives for as long as the command does."""

from __future__ import annotations

import argparse
import secrets
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from airflow_provider_raylm.cli.console import choice, complain
from airflow_provider_raylm.cli.jobs import run_verb
from airflow_provider_raylm.cli.sources import Trial, trial
from airflow_provider_raylm.cli.tasks import Moment, engine_of, find_dag, inference, rendered
from airflow_provider_raylm.errors import EngineError, RayLMError, SpecError
from airflow_provider_raylm.naming import application_name, fingerprint
from airflow_provider_raylm.operators.owners import installation
from airflow_provider_raylm.packages import pack
from airflow_provider_raylm.ray_jobs import RayJobs
from airflow_provider_raylm.specs import EngineRef, EngineSpec, Labels, Lease, build
from airflow_provider_raylm.specs.engine import COMMAND_RUN

TEMPORARY = "temporary"
# What ends a temporary engine when this process cannot any more.
LEASE = Lease(idle_timeout=600, max_lifetime=4 * 3600)
_DEPLOY_GRACE_S = 600.0
_TEARDOWN_S = 900.0


class Subject:
    """The task that a command is about, rendered as its arguments say.

    Args:
        arguments: those of ``commands._task``.

    Raises:
        SpecError: there is no such task, or it cannot be rendered.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        moment = Moment(arguments.conf, map_index=arguments.map_index, xcoms=dict(arguments.xcom))
        if arguments.logical_date is not None:
            moment.logical_date = arguments.logical_date
        task = inference(find_dag(arguments.dags_folder, arguments.dag_id), arguments.task_id)
        changed = {"source": arguments.source} if arguments.source else {}
        self._one, self._context = rendered(task, moment, changed=changed)
        self.engine: EngineSpec | None = engine_of(task, moment)
        self.conn_id: str = arguments.conn or self._one.raylm_conn_id
        self.folder = Path(self._one.dag.fileloc).parent

    @property
    def dag_id(self) -> str:
        """The DAG's id."""
        return str(self._one.dag_id)

    def trial(self, ref: EngineRef | None = None) -> Trial:
        """Return what to try, on an engine or without one.

        Raises:
            SpecError: what was given does not fit.
        """
        return trial(self._one, self._context, ref)


@contextmanager
def engine_for(subject: Subject, jobs: RayJobs, name: str | None) -> Iterator[EngineRef]:
    """Yield the engine on which a task is tried.

    Args:
        subject: the task.
        jobs: its cluster.
        name: an application, an engine's name, ``temporary``, or None for the one that runs for the DAG.

    Raises:
        EngineError: there is none, or there are several.
        RayLMError: a temporary one could not be deployed.
    """
    if name == TEMPORARY:
        with _temporary(subject, jobs) as ref:
            yield ref
        return
    running = jobs.running_engines()
    yield _named(name, running) if name else _own(subject, running)


def _named(name: str, running: Sequence[EngineRef]) -> EngineRef:
    fitting = [ref for ref in running if name in (ref.application, ref.labels.engine)]
    if len(fitting) == 1:
        return fitting[0]
    there = choice(name, (ref.application for ref in fitting or running))
    what = f"{len(fitting)} engines named {name!r} run; name one by its application" if fitting else f"No {name!r} runs"
    raise EngineError(f"{what}: {there}.")


def _own(subject: Subject, running: Sequence[EngineRef]) -> EngineRef:
    spec = subject.engine
    if spec is None:
        raise EngineError(
            "The task's engine is deployed elsewhere: say which, --engine NAME (`raylm engines` lists them)."
        )
    here = installation()
    fitting = [
        ref
        for ref in running
        if (ref.labels.installation, ref.labels.dag_id) == (here, subject.dag_id)
        and not ref.labels.of_a_command
        # Instances of a mapped task group have the instance's number behind the name.
        and ref.labels.engine.partition("[")[0] == spec.name
    ]
    if len(fitting) != 1:
        what = f"{len(fitting) or 'No'} engines {spec.name!r} of {subject.dag_id} run"
        there = f": {', '.join(ref.application for ref in fitting)}" if fitting else ""
        raise EngineError(
            f"{what}{there}. Name one that runs (--engine NAME), or have one deployed for this (--engine temporary)."
        )
    if fitting[0].fingerprint != fingerprint(spec):
        complain(f"{fitting[0].application} was deployed from another spec than the DAG has now")
    return fitting[0]


@contextmanager
def _temporary(subject: Subject, jobs: RayJobs) -> Iterator[EngineRef]:
    """Deploy the task's engine for as long as the body runs; it is torn down whatever happens."""
    if subject.engine is None:
        raise SpecError("The task's engine is deployed elsewhere: its spec is not in this DAG. Name one that runs.")
    spec = subject.engine.model_copy(update={"lease": LEASE})
    labels = Labels(
        installation=installation(),
        dag_id=subject.dag_id,
        run_id=f"{COMMAND_RUN}{secrets.token_hex(6)}",
        engine=spec.name,
    )
    application = application_name(labels)
    payload = {
        "engine": spec.model_dump(mode="json", exclude_unset=True),
        "labels": labels.model_dump(),
        "replace": False,
    }
    with _terminated_in_good_order():
        try:
            complain(f"deploying {application}, which is torn down at the end")
            environment = pack(spec.runtime_env.over(jobs.runtime_env), subject.folder)
            result = run_verb(
                jobs,
                "deploy",
                payload,
                timeout=spec.deploy_timeout + _DEPLOY_GRACE_S,
                task={"application": application},
                environment=environment,
            )
            yield build(EngineRef, {**result, "dashboard_url": jobs.dashboard_url})
        except BaseException:
            # What went wrong tells more than what goes wrong now.
            with suppress(RayLMError):
                _end(jobs, application)
            raise
        _end(jobs, application)


def _end(jobs: RayJobs, application: str) -> None:
    """Tear a temporary engine down.

    Raises:
        RayLMError: it may still be there; that has been said.
    """
    complain(f"tearing {application} down")
    try:
        run_verb(jobs, "teardown", {"application": application}, timeout=_TEARDOWN_S)
    except BaseException:
        complain(
            f"{application} may still be there: run `raylm engines stop {application}`. Its lease ends it after "
            f"{LEASE.idle_timeout:g} idle seconds."
        )
        raise


@contextmanager
def _terminated_in_good_order() -> Iterator[None]:
    """Let SIGTERM end the body as an exception does."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
