"""A task's batch as a job for the cluster: its spec, code and credentials, as the task itself would hand them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_provider_raylm.cli.jobs import run_verb
from airflow_provider_raylm.cli.tasks import authors_own
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.packages import pack
from airflow_provider_raylm.ray_jobs import RayJobs
from airflow_provider_raylm.specs import BatchSpec, EngineRef, Labels, Lease, RuntimeEnv, build
from airflow_provider_raylm.specs.previews import PlanReport, PreviewReport

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_provider_raylm.operators.base import Command

# Of a source of many files on a slow storage, the job's start included.
PLAN_TIMEOUT_S = 1800.0
# Beside that, an engine that comes back, and long answers.
PREVIEW_TIMEOUT_S = 3600.0
_NO_ENGINE = EngineRef(
    application="",
    deployment="",
    model="",
    fingerprint="",
    labels=Labels(installation="", dag_id="", run_id="", engine=""),
    lease=Lease(),
)


@dataclass(frozen=True)
class Trial:
    """A task that is tried.

    Attributes:
        batch: its spec.
        command: what the task would have its cluster do.
        conn_id: the connection of its cluster.
        names: dag_id and task_id.
        folder: of the DAG's file.
    """

    batch: BatchSpec
    command: Command
    conn_id: str
    names: Mapping[str, str]
    folder: Path

    def run(
        self, jobs: RayJobs, verb: str, payload: Mapping[str, Any], timeout: float, pad: bytes = b""
    ) -> dict[str, Any]:
        """Run a verb with the task's code and credentials, and return its result.

        Raises:
            RayLMError: what the cluster reported, or why it could not.
        """
        environment = (self.command.runtime_env or RuntimeEnv()).over(jobs.runtime_env)
        return run_verb(
            jobs,
            verb,
            payload,
            timeout=timeout,
            task=self.names,
            environment=pack(environment, self.folder),
            storage=self.command.storage,
            pad=pad,
        )

    def plan(self, jobs: RayJobs) -> PlanReport:
        """Return the plan of its source.

        Raises:
            RayLMError: as ``run``.
        """
        payload = {"batch": self.command.payload["batch"]}
        return build(PlanReport, self.run(jobs, "plan", payload, PLAN_TIMEOUT_S))

    def preview(self, jobs: RayJobs, rows: int, *, spread: bool = False, pad: bytes | None = None) -> PreviewReport:
        """Return what some rows come to on the engine.

        Args:
            jobs: the cluster.
            rows: how many.
            spread: take them from all over the source; else the first ones.
            pad: seals the rows; None for their counts alone.

        Raises:
            RayLMError: as ``run``.
        """
        own = self.command.payload
        payload = {
            "engine": own["engine"],
            "batch": own["batch"],
            "rows": rows,
            "spread": spread,
            "texts": pad is not None,
        }
        return build(PreviewReport, self.run(jobs, "preview", payload, PREVIEW_TIMEOUT_S, pad or b""))


def trial(task: BatchInferenceOperator, context: Context, ref: EngineRef | None = None) -> Trial:
    """Return what to try of a rendered task.

    Args:
        task: the task.
        context: in which it was rendered.
        ref: the engine; None when none is asked.

    Raises:
        SpecError: what was given does not fit.
    """
    task.engine = (ref or _NO_ENGINE).model_dump(mode="json")
    # Prompts in files are rendered only here.
    with authors_own(task):
        command = task.command(context)
    batch = build(BatchSpec, command.payload["batch"])
    names = {"dag_id": task.dag_id, "task_id": task.task_id}
    return Trial(batch, command, task.raylm_conn_id, names, Path(task.dag.fileloc).parent)
