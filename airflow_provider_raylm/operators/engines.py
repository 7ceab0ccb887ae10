"""The tasks by which engines come and go: deploy one, tear it down, sweep up what was left."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any, get_args

from airflow.sdk import XComArg

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.links.raylm import RayJobLink, ServeApplicationLink
from airflow_provider_raylm.naming import application_name
from airflow_provider_raylm.observability import measure
from airflow_provider_raylm.operators.base import (
    Command,
    DeferrableRayLMOperator,
    Outcome,
    RayLMOperator,
    json_values,
)
from airflow_provider_raylm.operators.checks import renderable, require_name
from airflow_provider_raylm.operators.owners import (
    application_of,
    deployed,
    installation,
    labels_of,
    on_the_engines_cluster,
    require_own,
    run_is_alive,
)
from airflow_provider_raylm.operators.places import plain
from airflow_provider_raylm.operators.retries import no_retries_in_vain
from airflow_provider_raylm.operators.templates import is_deferred
from airflow_provider_raylm.polling import require_seconds
from airflow_provider_raylm.specs import EngineRef, EngineSpec, OnBusy, SweepReport, TeardownReport, build

if TYPE_CHECKING:
    from airflow.sdk import DAG, Context

# What a deploy may take beyond its own timeout: the job's start, and the removal of an engine that failed.
_DEPLOY_GRACE_S = 600.0
TEARDOWN_RETRIES = 2


class DeployEngineOperator(DeferrableRayLMOperator):
    """Deploys the run's engine, or adopts it when an earlier try brought it up. Use as a setup task.

    Returns an ``EngineRef`` as JSON values. Whatever a failed deploy created is removed again.

    Args:
        engine: an EngineSpec, or a dict with its fields, in which strings may be Jinja templates.
        replace: replace an engine of the same name that another spec of this run deployed.
    """

    template_fields = ("engine",)
    operator_extra_links = (RayJobLink(), ServeApplicationLink())

    def __init__(self, *, engine: EngineSpec | dict[str, Any] | XComArg, replace: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.engine = renderable(EngineSpec, engine)
        self.replace = replace
        if self.is_as_written:
            _require_only(self)

    def command(self, context: Context) -> Command:
        """Return the deploy of the rendered spec."""
        spec = build(EngineSpec, plain(self.engine))
        labels = labels_of(context, spec.name)
        payload = {
            "engine": spec.model_dump(mode="json", exclude_unset=True),
            "labels": labels.model_dump(),
            "replace": self.replace,
        }
        return Command(
            "deploy",
            payload,
            spec.deploy_timeout + _DEPLOY_GRACE_S,
            application_name(labels),
            runtime_env=spec.runtime_env,
        )

    def finish(self, context: Context, outcome: Outcome) -> dict[str, Any]:
        """Return the EngineRef."""
        ref = build(EngineRef, {**outcome.result, "dashboard_url": outcome.dashboard_url})
        measure(
            context,
            {"engines_adopted" if ref.adopted else "engines_deployed": 1},
            {"deploy_duration": ref.deploy_seconds},
        )
        return json_values(ref)


class TeardownEngineOperator(DeferrableRayLMOperator):
    """Deletes the run's engine and waits until its resources are free. Use as a teardown task.

    Returns a ``TeardownReport`` as JSON values. An engine that is gone already is success; one that another DAG
    deployed, or a name that no task of this DAG deploys, is refused. It is tried three times, unless ``retries`` says
    otherwise: what is not deleted is paid for until its lease ends.

    Args:
        engine: the deploy task's output (an EngineRef), or the engine's name, which also works when that output was
            lost; while it is there, it counts.
        on_busy: while tasks work on the engine, such as one whose Airflow worker died: ``wait`` until they are done,
            ``fail``, or ``delete`` it under them.
        drain_timeout: seconds that ``wait`` waits at most; then it deletes.
    """

    template_fields = ("engine",)
    operator_extra_links = (RayJobLink(), ServeApplicationLink())

    def __init__(
        self,
        *,
        engine: EngineRef | dict[str, Any] | str | XComArg,
        on_busy: OnBusy = "wait",
        drain_timeout: float = 600,
        retries: int = TEARDOWN_RETRIES,
        **kwargs: Any,
    ) -> None:
        super().__init__(retries=retries, **on_the_engines_cluster(engine, kwargs))
        self._follows_deploy = isinstance(engine, str) and not kwargs.get("raylm_conn_id")
        if on_busy not in get_args(OnBusy):
            raise SpecError(f"on_busy: {on_busy!r} is none of {', '.join(get_args(OnBusy))}")
        require_seconds("drain_timeout", drain_timeout, from_zero=True)
        self.on_busy = on_busy
        self.drain_timeout = drain_timeout
        self.engine = engine if isinstance(engine, str) else renderable(EngineRef, engine)
        self._given = str(engine)
        if isinstance(engine, str) and not is_deferred(engine):
            require_name(engine)

    def command(self, context: Context) -> Command:
        """Return the teardown of the run's engine."""
        if isinstance(self.engine, str):
            application = self._application_of(self.engine, context)
        elif self.engine is None:
            raise SpecError(
                "engine: the deploy task left no reference. Give the engine's name instead (engine='…'): it is enough "
                "to find the engine of this run."
            )
        else:
            ref = build(EngineRef, plain(self.engine))
            require_own(ref, context)
            application = ref.application
        payload = {"application": application, "on_busy": self.on_busy, "drain_timeout": self.drain_timeout}
        return Command("teardown", payload, application=application)

    def _application_of(self, name: str, context: Context) -> str:
        """Return the application of this run's engine of that name; go where it was deployed unless told otherwise."""
        dag = context.get("dag")
        deploys = _deployed_by(dag, self.get_flat_relative_ids(upstream=True) if dag is not None else ())
        task_id, ref = deployed(name, self._given, deploys, context)
        if dag is not None and task_id is not None and self._follows_deploy:
            self.raylm_conn_id = getattr(dag.task_dict[task_id], "raylm_conn_id", self.raylm_conn_id)
        return application_of(name, deploys, context) if ref is None else ref.application

    def finish(self, context: Context, outcome: Outcome) -> dict[str, Any]:
        """Return the TeardownReport, having said who used the engine's time."""
        report = build(TeardownReport, outcome.result)
        spent = report.spent
        self.log.info(
            "engine %s: %.0f s, %d requests, %d generated tokens",
            *(report.application, report.engine_seconds, report.usage.requests, report.usage.completion_tokens),
        )
        self.log.info("%.0f s of them loading, %.0f s idle", spent.loading, spent.idle)
        for output, seconds in spent.tasks.items():
            self.log.info("%.0f s of them for %s", seconds, output)
        durations = {
            "engine_duration": report.engine_seconds,
            "engine_loading": spent.loading,
            "engine_idle": spent.idle,
        }
        measure(context, {}, durations if report.existed else {})
        return json_values(report)


class SweepEnginesOperator(RayLMOperator):
    """Deletes engines that outlived their run: those whose DAG run is over or deleted, and those that are too old.

    Only engines that this Airflow installation deployed through this provider are looked at.
    Returns a ``SweepReport`` as JSON values.

    Args:
        max_age: age past which an engine is deleted even if its run is still active; None for no bound.
    """

    def __init__(self, *, max_age: timedelta | None = timedelta(days=1), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_age = max_age

    def execute(self, context: Context) -> dict[str, Any]:
        """Sweep and return the SweepReport."""
        with no_retries_in_vain():
            report = self._sweep(context)
        self.log.info("%d engines found, %d deleted", len(report.engines), len(report.deleted))
        measure(context, {"engines_swept": len(report.deleted)}, {})
        return json_values(report)

    def _sweep(self, context: Context) -> SweepReport:
        payload: dict[str, Any] = {"delete": [], "max_age": None, "installation": installation()}
        listed = build(SweepReport, self.run_on_cluster(context, Command("sweep", payload)).result)
        over = [
            engine.application
            for engine in listed.engines
            # A command's has no run, and ends with the command or by its lease.
            if not engine.labels.of_a_command and not run_is_alive(context, engine.labels)
        ]
        max_age = self.max_age.total_seconds() if self.max_age is not None else None
        swept = self.run_on_cluster(context, Command("sweep", {**payload, "delete": over, "max_age": max_age}))
        return build(SweepReport, swept.result)


def _deployed_by(dag: DAG | None, first: Collection[str]) -> dict[str, Any]:
    """Return the name of the engine that each deploy task of a DAG deploys, *first* first; None where it is unknown."""
    deploys = [task for task in (dag.tasks if dag is not None else ()) if isinstance(task, DeployEngineOperator)]
    deploys.sort(key=lambda task: task.task_id not in first)
    return {task.task_id: _name_of(task) for task in deploys}


def _name_of(deploy: DeployEngineOperator) -> Any:
    """Return the name of the engine that a task deploys, as the DAG has it; None where it is unknown."""
    return deploy.engine.get("name") if isinstance(deploy.engine, dict) else None


def _require_only(deploy: DeployEngineOperator) -> None:
    """Refuse a second engine of one name in a DAG: a run's engines are known by their names.

    Raises:
        SpecError: another task deploys one.
    """
    name = _name_of(deploy)
    for task in deploy.dag.tasks if name is not None else ():
        if isinstance(task, DeployEngineOperator) and task is not deploy and _name_of(task) == name:
            raise SpecError(
                f"{deploy.task_id}: {task.task_id} deploys an engine named {name!r} already. Both would be one engine, "
                "which the first teardown takes from the other: give it another name, or share it."
            )
