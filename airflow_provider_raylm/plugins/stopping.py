"""Stop an engine from the Engines page: the same teardown, as a job, as its DAG's own task runs."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import NoReturn

from airflow_provider_raylm.following import submit_or_attach
from airflow_provider_raylm.naming import submission_id
from airflow_provider_raylm.plugins.watching import Connect
from airflow_provider_raylm.polling import Unreachable
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.specs import EngineRef, OnBusy

log = logging.getLogger(__name__)

# Stands where a task's id does in the names of jobs.
TASK = "engines page"
DRAIN_S = 600.0


def stop_engine(connect: Connect, ref: EngineRef, on_busy: OnBusy) -> str:
    """Have an engine torn down and return the job's id, which is the same for whoever asks for the same.

    Args:
        connect: opens a client of its cluster.
        ref: the engine.
        on_busy: what is done with tasks that work on it; "wait" waits for ten minutes at most.

    Raises:
        ClusterError: the cluster refuses, or does not answer: here somebody waits for the answer.
    """
    payload = {"application": ref.application, "on_busy": on_busy, "drain_timeout": DRAIN_S}
    labels = ref.labels
    metadata = {"dag_id": labels.dag_id, "run_id": labels.run_id, "application": ref.application, "task_id": TASK}
    # An engine that is deployed again has the same name, and may have to be stopped again.
    content = [payload, ref.deployed_at]

    def request(attempt: int) -> JobRequest:
        name = submission_id("teardown", (labels.dag_id, labels.run_id, TASK, -1), content, attempt)
        return JobRequest(name, "teardown", payload, metadata)

    def give_up(_: float) -> NoReturn:
        raise Unreachable(
            "The cluster does not answer: it is not known whether the engine is being stopped. Try again."
        )

    with closing(connect()) as jobs:
        return submit_or_attach(jobs, request, log.info, pause=give_up)
