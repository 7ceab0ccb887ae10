"""What the tasks have in common: one verb on the cluster, as a Ray job that is followed to its end or stopped."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator, BaseOperatorLink, conf

from airflow_provider_raylm.errors import from_wire
from airflow_provider_raylm.following import Follower, Stopped, submit_or_attach
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.links.raylm import RayJobLink, store_links
from airflow_provider_raylm.naming import submission_id
from airflow_provider_raylm.observability import annotate
from airflow_provider_raylm.polling import Watch
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobs
from airflow_provider_raylm.triggers.raylm import RayJobTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context


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
        self._told_to_end = False

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
        metadata = {
            "dag_id": ti.dag_id,
            "run_id": ti.run_id,
            "task_id": ti.task_id,
            "map_index": str(task[3]),
            # Goes up when a task of the run is cleared, and stays over retries.
            "clear_number": str(context["dag_run"].clear_number),
        }

        def request(attempt: int) -> JobRequest:
            name = submission_id(command.verb, task, command.payload, attempt)
            return JobRequest(name, command.verb, command.payload, metadata)

        job = submit_or_attach(jobs, request, self.log.info, command.lasting)
        self._follower = Follower(jobs, job, self.log.info, self.poll_interval)
        store_links(context, jobs.dashboard_url, job, command.application, command.output)
        annotate(submission_id=job, application=command.application, output=command.output)
        if self._told_to_end:
            self._follower.end()
            raise Stopped(f"The task was told to end while it submitted Ray job {job}, which was told to stop.")
        return self._follower

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
