"""The tasks of a DAG: deploy an engine, use it, tear it down, sweep up what was left.

Specs do the validating and the cluster does the work; an operator adds what Airflow knows: whose run this is, and who
is told of the outcome.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from airflow.sdk import XComArg, conf

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.links.raylm import OutputLink, RayJobLink, ServeApplicationLink
from airflow_provider_raylm.naming import application_name, fingerprint
from airflow_provider_raylm.observability import announce, collect_lineage, measure, measure_batch, openlineage
from airflow_provider_raylm.operators.base import Command, DeferrableRayLMOperator, Outcome, RayLMOperator
from airflow_provider_raylm.specs import (
    BatchReport,
    BatchSpec,
    EngineRef,
    EngineSpec,
    Labels,
    OnBusy,
    SpecT,
    SweepReport,
    TeardownReport,
    Value,
    build,
    check_unrendered,
)

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

# What a deploy may take beyond its own timeout: the job's start, and the removal of an engine that failed.
_DEPLOY_GRACE_S = 600.0


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
        self.engine = _renderable(EngineSpec, engine)
        self.replace = replace

    def command(self, context: Context) -> Command:
        """Return the deploy of the rendered spec."""
        spec = build(EngineSpec, self.engine)
        labels = _labels(context, spec.name)
        payload = {
            "engine": spec.model_dump(mode="json", exclude_unset=True),
            "labels": labels.model_dump(),
            "replace": self.replace,
        }
        return Command("deploy", payload, spec.deploy_timeout + _DEPLOY_GRACE_S, application_name(labels))

    def finish(self, context: Context, outcome: Outcome) -> dict[str, Any]:
        """Return the EngineRef."""
        ref = build(EngineRef, {**outcome.result, "dashboard_url": outcome.dashboard_url})
        measure(
            context,
            {"engines_adopted" if ref.adopted else "engines_deployed": 1},
            {"deploy_duration": ref.deploy_seconds},
        )
        return _json(ref)


class BatchInferenceOperator(DeferrableRayLMOperator):
    """Answers every row of a source with a deployed engine.

    Returns a ``BatchReport`` as JSON values: counts and places, never rows.

    Args:
        engine: the deploy task's output (an EngineRef).
        batch: a BatchSpec, or a dict with its fields, in which strings may be Jinja templates and ``source`` may be
            an earlier task's output.
        redeploy: the EngineSpec that the deploy task was given: the engine is deployed again when it is gone, such as
            for a retry after Ray was restarted. Its lease then ends it after five idle minutes, if no teardown does.
            None: the task fails then.
    """

    template_fields: Collection[str] = ("engine", "batch", "redeploy")
    template_fields_renderers: ClassVar[dict[str, str]] = {"batch": "json"}
    operator_extra_links = (RayJobLink(), ServeApplicationLink(), OutputLink())

    def __init__(
        self,
        *,
        engine: EngineRef | dict[str, Any] | XComArg,
        batch: BatchSpec | dict[str, Any] | XComArg,
        redeploy: EngineSpec | dict[str, Any] | XComArg | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.engine = _renderable(EngineRef, engine)
        self.batch = _renderable(BatchSpec, batch)
        self.redeploy = _renderable(EngineSpec, redeploy)
        self._report: BatchReport | None = None

    def command(self, context: Context) -> Command:
        """Return the inference of the rendered spec."""
        if self.engine is None:
            raise SpecError("engine: the deploy task left no reference. Clear the deploy task together with this one.")
        engine, batch = build(EngineRef, self.engine), build(BatchSpec, self.batch)
        payload = {"engine": _json(engine), "batch": batch.model_dump(mode="json", exclude_unset=True)}
        if self.redeploy is not None:
            spec = build(EngineSpec, self.redeploy)
            _require_own(engine, context)
            if fingerprint(spec) != engine.fingerprint:
                raise SpecError(
                    f"redeploy: not the spec that {engine.application} was deployed with (fingerprint "
                    f"{engine.fingerprint}, now {fingerprint(spec)}). Clear the deploy task together with this one."
                )
            payload["redeploy"] = spec.model_dump(mode="json", exclude_unset=True)
        return Command("infer", payload, application=engine.application, output=batch.output, lasting=True)

    def finish(self, context: Context, outcome: Outcome) -> dict[str, Any]:
        """Return the BatchReport; measure it, and put it into the events of the outlets and into the lineage."""
        report = self._report = build(BatchReport, outcome.result)
        self.log.info(
            "%d rows in = %d written + %d quarantined + %d already done; %.1f rows/s, %.0f tokens/s; output %s",
            *(report.rows_in, report.rows_written, report.rows_quarantined, report.rows_already_done),
            *(report.rows_per_s, report.tokens_per_s, report.output),
        )
        measure_batch(context, report)
        announce(context, self.outlets, report)
        collect_lineage(RayLMHook(self.raylm_conn_id), report.source, report.output)
        return _json(report)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any] | None:
        """Return what was read and written, for the OpenLineage provider, which calls this."""
        return openlineage(self._report) if self._report is not None else None


class TeardownEngineOperator(DeferrableRayLMOperator):
    """Deletes the run's engine and waits until its resources are free. Use as a teardown task.

    Returns a ``TeardownReport`` as JSON values. An engine that is gone already is success; one that another DAG
    deployed is refused.

    Args:
        engine: the deploy task's output (an EngineRef), or the engine's name, which also works when that output was
            lost.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if on_busy not in get_args(OnBusy):
            raise SpecError(f"on_busy: {on_busy!r} is none of {', '.join(get_args(OnBusy))}")
        self.on_busy = on_busy
        self.drain_timeout = drain_timeout
        self.engine = engine if isinstance(engine, str) else _renderable(EngineRef, engine)

    def command(self, context: Context) -> Command:
        """Return the teardown of the run's engine."""
        if isinstance(self.engine, str):
            application = application_name(_labels(context, self.engine))
        elif self.engine is None:
            raise SpecError(
                "engine: the deploy task left no reference. Give the engine's name instead (engine='…'): it is enough "
                "to find the engine of this run."
            )
        else:
            ref = build(EngineRef, self.engine)
            _require_own(ref, context)
            application = ref.application
        payload = {"application": application, "on_busy": self.on_busy, "drain_timeout": self.drain_timeout}
        return Command("teardown", payload, application=application)

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
        return _json(report)


class SweepEnginesOperator(RayLMOperator):
    """Deletes engines that outlived their run: those whose DAG run is over or deleted, and those that are too old.

    Only engines that this Airflow installation deployed through this provider are looked at.
    Returns a ``SweepReport`` as JSON values.

    Args:
        max_age: age past which an engine is deleted even if its run still goes on; None for no bound.
    """

    def __init__(self, *, max_age: timedelta | None = timedelta(days=1), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_age = max_age

    def execute(self, context: Context) -> dict[str, Any]:
        """Sweep and return the SweepReport."""
        payload: dict[str, Any] = {"delete": [], "max_age": None, "installation": installation()}
        listed = self.run_on_cluster(context, Command("sweep", payload)).result
        over = [
            engine.application
            for engine in build(SweepReport, listed).engines
            if not _run_is_alive(context, engine.labels)
        ]
        max_age = self.max_age.total_seconds() if self.max_age is not None else None
        swept = self.run_on_cluster(context, Command("sweep", {**payload, "delete": over, "max_age": max_age}))
        report = build(SweepReport, swept.result)
        self.log.info("%d engines found, %d deleted", len(report.engines), len(report.deleted))
        measure(context, {"engines_swept": len(report.deleted)}, {})
        return _json(report)


def _labels(context: Context, engine: str) -> Labels:
    ti = context["ti"]
    return Labels(installation=installation(), dag_id=ti.dag_id, run_id=ti.run_id, engine=engine)


def _require_own(ref: EngineRef, context: Context) -> None:
    if (ref.labels.installation, ref.labels.dag_id) != (installation(), context["ti"].dag_id):
        raise SpecError(
            f"engine: {ref.application} belongs to the DAG {ref.labels.dag_id} of {ref.labels.installation}. Only that "
            "one deploys it and tears it down."
        )


def installation() -> str:
    """Return what tells this Airflow from another on the same cluster: its name, else its API server's address."""
    name = conf.get("raylm", "installation", fallback=None) or conf.get("api", "base_url", fallback=None)
    return str(name or "http://localhost:8080")


def _run_is_alive(context: Context, labels: Labels) -> bool:
    """Return whether the run is queued or running; a deleted run is not."""
    alive = context["ti"].get_dr_count(labels.dag_id, run_ids=[labels.run_id], states=["queued", "running"])
    return bool(alive)


def _renderable(spec: type[SpecT], value: Any) -> Any:
    """Return *value* as Airflow can render it, after checking what is known when the DAG is parsed."""
    if isinstance(value, spec):
        return value.model_dump(mode="json", exclude_unset=True)
    check_unrendered(spec, value, _is_deferred)
    return value


def _is_deferred(value: object) -> bool:
    """Return whether Airflow fills in (part of) the value when the task runs."""
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    if isinstance(value, Mapping):
        return any(_is_deferred(one) for one in value.values())
    if isinstance(value, list | tuple):
        return any(_is_deferred(one) for one in value)
    # As Airflow tells what it has to resolve: another task's output, an argument of a mapped task group.
    return value is None or (hasattr(value, "resolve") and not isinstance(value, os.PathLike))


def _json(value: Value) -> dict[str, Any]:
    dumped: dict[str, Any] = value.model_dump(mode="json")
    return dumped
