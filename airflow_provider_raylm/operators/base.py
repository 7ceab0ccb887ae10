"""What the tasks have in common: one verb on the cluster, as a Ray job that is followed to its end or stopped."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator, BaseOperatorLink

from airflow_provider_raylm.compat import allow_class, conf
from airflow_provider_raylm.errors import from_wire
from airflow_provider_raylm.following import Follower, Stopped, submit_or_attach
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.links.raylm import RayJobLink, store_links
from airflow_provider_raylm.naming import submission_id
from airflow_provider_raylm.observability import annotate, measure_progress
from airflow_provider_raylm.operators.rendering import RendersText
from airflow_provider_raylm.operators.retries import no_retries_in_vain
from airflow_provider_raylm.packages import Packed, pack
from airflow_provider_raylm.polling import PENDING_TIMEOUT_S, Watch, require_seconds
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobs
from airflow_provider_raylm.specs import (
    BatchReport,
    BatchSpec,
    EngineRef,
    EngineSpec,
    RuntimeEnv,
    SweepReport,
    TeardownReport,
    Value,
)
from airflow_provider_raylm.triggers.raylm import RayJobTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

# Values that tasks may return as objects: whatever reads them from XCom has imported the DAG, and so this module.
for _value in (BatchSpec, EngineSpec, EngineRef, BatchReport, TeardownReport, SweepReport):
    allow_class(_value)


@dataclass(frozen=True)
class Command:
    """What a task has the cluster do.

    Attributes:
        verb: deploy, infer, teardown or sweep.
        payload: the verb's arguments, JSON values.
        timeout: seconds after its start at which its job is stopped; None leaves it to ``execution_timeout``.
        application: the engine that it concerns, for the links.
        output: where answers go, for the links.
        lasting: whether its result still holds when nobody was there to take it: a retry takes it then.
        runtime_env: what its job finds beside the image, over what the connection says; None for the image alone: what
            only needs this package must not fail with somebody's.
        storage: options of fsspec's file systems, by protocol, which only the job may see.
    """

    verb: str
    payload: Mapping[str, Any]
    timeout: float | None = None
    application: str | None = None
    output: str | None = None
    lasting: bool = False
    runtime_env: RuntimeEnv | None = None
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)


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


def json_values(value: Value) -> dict[str, Any]:
    """Return a value as it goes into an XCom or a request."""
    dumped: dict[str, Any] = value.model_dump(mode="json")
    return dumped


class RayLMOperator(RendersText, BaseOperator):
    """Runs one verb on the cluster as a Ray job and returns its result.

    A retry attaches to the job that is still running for the same task and request, and never submits a second one.

    Args:
        raylm_conn_id: connection to the Ray cluster; None for the hook's default.
        poll_interval: seconds between two looks at the job.
        pending_timeout: seconds that the job may wait to start, by the cluster's clock; then it is stopped.

    Raises:
        SpecError: *pending_timeout* or *poll_interval* is none.
    """

    ui_color = "#cfe8ff"
    operator_extra_links: Collection[BaseOperatorLink] = (RayJobLink(),)

    def __init__(
        self,
        *,
        raylm_conn_id: str | None = None,
        poll_interval: float = 3.0,
        pending_timeout: float = PENDING_TIMEOUT_S,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_seconds("pending_timeout", pending_timeout)
        require_seconds("poll_interval", poll_interval, from_zero=True)
        self.raylm_conn_id = raylm_conn_id or RayLMHook.default_conn_name
        self.poll_interval = poll_interval
        self.pending_timeout = pending_timeout
        self._follower: Follower | None = None
        self._told_to_end = False
        # By their key; None in a process that did not begin the job, where XCom tells.
        self.links: dict[str, str] | None = {}

    @property
    def is_as_written(self) -> bool:
        """Whether this is a DAG's task, and not one of those that a mapped task became when it ran."""
        return self.has_dag() and self.dag.task_dict.get(self.task_id) is self  # type: ignore[no-untyped-call]

    def run_on_cluster(self, context: Context, command: Command) -> Outcome:
        """Run *command* and return its outcome.

        Raises:
            RayLMError: what the cluster reported, or why it could not.
        """
        with closing(RayLMHook(self.raylm_conn_id).get_conn()) as jobs:
            follower = self._begin(jobs, context, command)
            watch = Watch(deadline=self._deadline(command), pending_timeout=self.pending_timeout)
            return Outcome(follower.wait(watch), jobs.dashboard_url, follower.submission_id)

    def _deadline(self, command: Command, *bounds: float) -> float | None:
        """Return the Unix seconds at which the job has to be done, by its own time-out and by *bounds* from now."""
        own = [self.pending_timeout + command.timeout] if command.timeout is not None else []
        return min((time.time() + bound for bound in (*own, *bounds)), default=None)

    def _begin(self, jobs: RayJobs, context: Context, command: Command) -> Follower:
        """Attach to the job that runs for this task and command, or submit one."""
        ti = context["ti"]
        task = (ti.dag_id, ti.run_id, ti.task_id, ti.map_index if ti.map_index is not None else -1)
        metadata = {
            "dag_id": ti.dag_id,
            "run_id": ti.run_id,
            "task_id": ti.task_id,
            "map_index": str(task[3]),
            # Goes up when a task of the run is cleared, and stays over retries.
            "clear_number": str(context["dag_run"].clear_number),
            # By which the engines page finds the jobs of an engine.
            **({"application": command.application} if command.application else {}),
        }

        environment = self._packed(jobs, command)
        # A job with other code or variables is another one.
        content = [command.payload, environment.identity] if environment.identity else command.payload

        def request(attempt: int) -> JobRequest:
            name = submission_id(command.verb, task, content, attempt)
            return JobRequest(name, command.verb, command.payload, metadata, environment, command.storage)

        job = submit_or_attach(
            jobs, request, self.log.info, command.lasting, self.pending_timeout, self._pause_unless_told_to_end
        )
        self._follower = Follower(jobs, job, self.log.info, self.poll_interval, partial(measure_progress, ti))
        self.links = store_links(context, jobs.dashboard_url, job, command.application, command.output)
        annotate(submission_id=job, application=command.application, output=command.output)
        if self._told_to_end:
            self._follower.end()
            raise Stopped(f"The task was told to end while it submitted Ray job {job}, which was told to stop.")
        return self._follower

    def _packed(self, jobs: RayJobs, command: Command) -> Packed:
        if command.runtime_env is None:
            return Packed()
        folder = Path(self.dag.fileloc).parent if self.has_dag() else Path()  # type: ignore[no-untyped-call]
        return pack(command.runtime_env.over(jobs.runtime_env), folder)

    def _pause_unless_told_to_end(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._told_to_end:
                raise Stopped("The task was told to end while the cluster was silent, before it had a Ray job.")
            time.sleep(min(seconds, 0.2))

    def on_kill(self) -> None:
        """Stop the remote job; Airflow calls this when the task is marked, cleared or timed out."""
        self._told_to_end = True
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

    @property
    def gone_for_good(self) -> bool:
        """Whether an engine that is gone stays so, whatever a retry does."""
        return True

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
        with no_retries_in_vain(self.gone_for_good):
            command = self.command(context)
            if self.deferrable:
                self._defer(context, command)
            return self.finish(context, self.run_on_cluster(context, command))

    def _defer(self, context: Context, command: Command) -> NoReturn:
        now = time.time()
        # Airflow does not look at execution_timeout while a task is deferred.
        bounds = [self.execution_timeout.total_seconds()] if self.execution_timeout else []
        deadline = self._deadline(command, *bounds)
        with closing(RayLMHook(self.raylm_conn_id).get_conn()) as jobs:
            job = self._begin(jobs, context, command).submission_id
        trigger = RayJobTrigger(self.raylm_conn_id, job, self.poll_interval, deadline, now, self.pending_timeout)
        self.defer(trigger=trigger, method_name=self.resume.__name__)

    def resume(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Return the result that the trigger brought.

        Raises:
            RayLMError: what the cluster reported, or why it could not.
        """
        self.links = None
        with no_retries_in_vain(self.gone_for_good):
            if "error" in event:
                raise from_wire(event["error"])
            return self.finish(context, Outcome(**event))
