"""The tasks of a DAG: deploy an engine, use it, tear it down, sweep up what was left.

Specs do the validating and the cluster does the work; an operator adds what Airflow knows: whose run this is, which
job is already running for it, and when to stop it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, get_args

from airflow.sdk import BaseOperator, BaseOperatorLink, XComArg, conf

from airflow_provider_raylm.errors import SpecError, from_wire
from airflow_provider_raylm.following import Follower, submit_or_attach
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.links.raylm import OutputLink, RayJobLink, ServeApplicationLink, store_links
from airflow_provider_raylm.naming import application_name, fingerprint, submission_id
from airflow_provider_raylm.observability import (
    annotate,
    announce,
    collect_lineage,
    measure,
    measure_batch,
    openlineage,
)
from airflow_provider_raylm.polling import Watch
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobs
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
from airflow_provider_raylm.triggers.raylm import RayJobTrigger

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

# What a deploy may take beyond its own timeout: the job's start, and the removal of an engine that failed.
_DEPLOY_GRACE_S = 600.0
# In the task's state store, which a retry sees, and so does a task that was cleared: the job whose result it returned.
_LANDED = "raylm_landed"


@dataclass(frozen=True)
class Command:
    """What a task has the cluster do.

    Attributes:
        verb: deploy, infer, teardown or sweep.
        payload: the verb's arguments, JSON values.
        timeout: seconds after which its job is stopped; None leaves it to ``execution_timeout``.
        application: the engine that it concerns, for the links.
        output: where answers go, for the links.
        lasting: whether its result still holds when nobody was there to take it: a retry takes it then.
    """

    verb: str
    payload: Mapping[str, Any]
    timeout: float | None = None
    application: str | None = None
    output: str | None = None
    lasting: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        result: what the job reported.
        dashboard_url: the dashboard's address.
        submission_id: the job.
    """

    result: dict[str, Any]
    dashboard_url: str
    submission_id: str


class RayLMOperator(BaseOperator):
    """Runs one verb on the cluster as a Ray job and returns its result.

    A retry attaches to the job that is still running for the same task and request, and never submits a second one.

    Args:
        raylm_conn_id: connection to the Ray cluster.
        poll_interval: seconds between two looks at the job.
    """

    ui_color = "#cfe8ff"
    operator_extra_links: Collection[BaseOperatorLink] = (RayJobLink(),)

    def __init__(
        self, *, raylm_conn_id: str = RayLMHook.default_conn_name, poll_interval: float = 3.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.raylm_conn_id = raylm_conn_id
        self.poll_interval = poll_interval
        self._follower: Follower | None = None

    def run_on_cluster(self, context: Context, command: Command) -> Outcome:
        """Run *command* and return its outcome.

        Raises:
            RayLMError: what the cluster reported, or why it could not.
        """
        with closing(RayLMHook(self.raylm_conn_id).get_conn()) as jobs:
            follower = self._begin(jobs, context, command)
            deadline = time.time() + command.timeout if command.timeout is not None else None
            return Outcome(follower.wait(Watch(deadline=deadline)), jobs.dashboard_url, follower.submission_id)

    def _begin(self, jobs: RayJobs, context: Context, command: Command) -> Follower:
        """Attach to the job that runs for this task and command, or submit one."""
        ti = context["ti"]
        task = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index if ti.map_index is not None else -1)
        metadata = {"dag_id": ti.dag_id, "run_id": ti.run_id, "task_id": ti.task_id, "map_index": str(task[3])}

        def request(attempt: int) -> JobRequest:
            name = submission_id(command.verb, task, command.payload, attempt)
            return JobRequest(name, command.verb, command.payload, metadata)

        def wanted(job: str) -> bool:
            return command.lasting and context["task_state_store"].get(_LANDED) != job

        job = submit_or_attach(jobs, request, self.log.info, wanted)
        self._follower = Follower(jobs, job, self.log.info, self.poll_interval)
        store_links(context, jobs.dashboard_url, job, command.application, command.output)
        annotate(submission_id=job, application=command.application, output=command.output)
        return self._follower

    def on_kill(self) -> None:
        """Stop the remote job; Airflow calls this when the task is marked, cleared or timed out."""
        if self._follower is not None:
            self._follower.end()


class DeferrableRayLMOperator(RayLMOperator):
    """Runs one job, and needs no worker while it waits if *deferrable*.

    Args:
        deferrable: wait in the triggerer. Default: ``[operators] default_deferrable``.
    """

    def __init__(
        self, *, deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.deferrable = deferrable

    def command(self, context: Context) -> Command:
        """Return what the cluster has to do.

        Raises:
            SpecError: what was given does not fit.
        """
        raise NotImplementedError

    def finish(self, context: Context, outcome: Outcome) -> dict[str, Any]:
        """Tell of the outcome, and return what the task returns."""
        raise NotImplementedError

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the job and return its result."""
        command = self.command(context)
        if self.deferrable:
            self._defer(context, command)
        return self.finish(context, self.run_on_cluster(context, command))

    def _defer(self, context: Context, command: Command) -> NoReturn:
        now = time.time()
        # Airflow does not look at execution_timeout while a task is deferred.
        bounds = [command.timeout, self.execution_timeout.total_seconds() if self.execution_timeout else None]
        deadline = min((now + bound for bound in bounds if bound is not None), default=None)
        with closing(RayLMHook(self.raylm_conn_id).get_conn()) as jobs:
            job = self._begin(jobs, context, command).submission_id
        trigger = RayJobTrigger(self.raylm_conn_id, job, self.poll_interval, deadline, now)
        self.defer(trigger=trigger, method_name=self.resume.__name__)

    def resume(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Return the result that the trigger brought.

        Raises:
            RayLMError: what the cluster reported, or why it could not.
        """
        if "error" in event:
            raise from_wire(event["error"])
        return self.finish(context, Outcome(**event))


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
        context["task_state_store"].set(_LANDED, outcome.submission_id)
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
    return value is None or isinstance(value, XComArg)


def _json(value: Value) -> dict[str, Any]:
    dumped: dict[str, Any] = value.model_dump(mode="json")
    return dumped
