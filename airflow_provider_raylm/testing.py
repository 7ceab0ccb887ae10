"""For the unit tests of people who write DAGs: a Ray cluster that is not there.

A test with it::

    fake = FakeRayJobs()
    with fake.installed():
        run = dag.test()
    assert run.state == "success"
    assert fake.engines == {}                       # nothing was left behind
    assert fake.batches["label"].max_tokens == 4    # what a task asked for, rendered

Jobs end at once, unless ``pend`` says otherwise. The same contract suite runs against this class and against real Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from airflow_provider_raylm.errors import RayLMError, SpecError
from airflow_provider_raylm.fakes import FakeVerbs
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.inventory import RUNNING, SeenEngine, SeenJob, reference
from airflow_provider_raylm.operators.owners import installation
from airflow_provider_raylm.polling import FAILED, PENDING, STOPPED, SUCCEEDED, TERMINAL, JobInfo
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.specs import (
    EngineRef,
    EngineSpec,
    RuntimeEnv,
)
from airflow_provider_raylm.wire import error_line, result_line, said_line

NOT_STARTED = "Job has not started yet. It may be waiting for the runtime environment to be set up."


class FakeRayJobs(FakeVerbs):
    """A ``RayJobs`` in memory: engines are names, inference tasks answer with the counts they are told.

    Attributes:
        engines: applications that are deployed and not torn down, with their specs.
        deployed: names of all engines that were ever started, in order.
        batches: the BatchSpec of every inference task that was submitted, by task id (the last one of a mapped task).
        submitted: every request, in order.
    """

    dashboard_url = "http://fake-ray:8265"
    runtime_env = RuntimeEnv()

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[JobRequest] = []
        self._jobs: dict[str, tuple[JobInfo, str]] = {}
        self._failures: dict[str, list[RayLMError]] = {}
        self._pends: dict[str, tuple[float, str]] = {}
        self._waiting: dict[str, tuple[JobRequest, float]] = {}
        self._stopped: set[str] = set()

    @property
    def engines(self) -> dict[str, EngineSpec]:
        """The engines that are up, by application."""
        return {application: engine.spec for application, engine in self._engines.items()}

    @contextmanager
    def installed(self) -> Iterator[FakeRayJobs]:
        """Let every raylm connection lead here while the body runs; no connection needs to exist."""

        def connect(hook: RayLMHook) -> FakeRayJobs:
            return self

        async def aconnect(hook: RayLMHook) -> FakeRayJobs:
            return self

        try:
            named = {"AIRFLOW__RAYLM__INSTALLATION": installation()}
        except SpecError:
            named = {"AIRFLOW__RAYLM__INSTALLATION": "fake"}
        with (
            patch.object(RayLMHook, "get_conn", connect),
            patch.object(RayLMHook, "aget_conn", aconnect),
            patch.dict(os.environ, named),
        ):
            yield self

    def report(self, task_id: str, rows: int = 1, **counts: Any) -> None:
        """Say what the inference task *task_id* will report: *rows* in, and further BatchReport fields.

        Rows that no field mentions count as written; so ``report("label", 10, failures={"null_value": 2})`` gives 8
        written and 2 quarantined.
        """
        quarantined = sum(counts.get("failures", {}).values())
        done = counts.get("rows_already_done", 0)
        self._reports[task_id] = {
            "rows_in": rows,
            "rows_quarantined": quarantined,
            "rows_written": rows - quarantined - done,
            **counts,
        }

    def columns(self, task_id: str) -> dict[str, str]:
        """Return the columns that the answers of the task *task_id* become, and their Arrow types as text.

        Needs pyarrow, and jsonschema for an ``output_schema``. An embedding without ``dimensions`` has as many numbers
        as the model gives; here it is a list of any size.

        Raises:
            LookupError: no inference task of that name was submitted; the text has those that were.
        """
        from airflow_provider_raylm.cluster.batch.rows import EngineTraits, compile_step

        if task_id not in self.batches:
            there = ", ".join(self.batches) or "none"
            raise LookupError(f"columns: no inference task {task_id!r} was submitted; there is {there}")
        steps = self.batches[task_id].all_steps
        made = [column for step in steps for column in compile_step(step, EngineTraits()).columns]
        return {column.name: str(column.type) for column in made}

    def fail(self, task_id: str, error: RayLMError) -> None:
        """Let the next job of the task *task_id* fail with *error*; call again to fail the one after it, too."""
        self._failures.setdefault(task_id, []).append(error)

    def pend(self, task_id: str, looks: float = float("inf"), message: str = NOT_STARTED) -> None:
        """Let the jobs of the task *task_id* wait to start, until somebody has looked *looks* times at one.

        Give the task a short ``poll_interval``, and for a job that never starts a short ``pending_timeout``.
        """
        self._pends[task_id] = (looks, message)

    def ray_version(self) -> str:
        """Return a version that is no real one."""
        return "0.0-fake"

    def submit(self, request: JobRequest) -> bool:
        """Run the job to its end, or let it wait; return False when one with that id exists already."""
        if request.submission_id in self._jobs:
            return False
        request.wire()
        self.submitted.append(request)
        looks, message = self._pends.get(request.metadata.get("task_id", ""), (0, ""))
        if looks:
            job = JobInfo(PENDING, message, request.metadata, time.time(), started=False)
            self._jobs[request.submission_id] = (job, "")
            self._waiting[request.submission_id] = (request, looks)
        else:
            self._jobs[request.submission_id] = self._run(request, time.time())
        return True

    def _run(self, request: JobRequest, submitted_at: float) -> tuple[JobInfo, str]:
        said = said_line(1, f"{request.verb} on a fake cluster")
        try:
            failures = self._failures.get(request.metadata.get("task_id", ""))
            if failures:
                raise failures.pop(0)
            result = self.verbs()[request.verb](dict(request.payload), request)
        except RayLMError as error:
            log = f"{said}\n{error_line(error)}\n"
            job = JobInfo(FAILED, "the job failed", request.metadata, submitted_at)
        else:
            log = f"{said}\n{result_line(result.model_dump(mode='json'))}\n"
            job = JobInfo(SUCCEEDED, "", request.metadata, submitted_at)
        return job, log

    def get(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None. One that waits is a look nearer to its start."""
        job = self._jobs.get(submission_id)
        if job is None:
            return None
        if submission_id in self._waiting:
            self._come_nearer(submission_id, job[0])
        return job[0]

    def _come_nearer(self, submission_id: str, job: JobInfo) -> None:
        request, looks = self._waiting.pop(submission_id)
        if looks > 1:
            self._waiting[submission_id] = (request, looks - 1)
        elif submission_id in self._stopped:
            self._jobs[submission_id] = (replace(job, status=STOPPED, message="", started=True), "")
        else:
            self._jobs[submission_id] = self._run(request, job.submitted_at or 0.0)

    def logs(self, submission_id: str, lines: int | None = None) -> str:
        """Return the last *lines* of the job's output, or all."""
        job = self._jobs.get(submission_id)
        written = job[1].splitlines(keepends=True) if job else []
        return "".join(written[-lines:] if lines else written)

    def stop(self, submission_id: str) -> None:
        """Stop the job if it has not ended. One that waits ends when it would start, and not sooner, as with Ray."""
        self._stopped.add(submission_id)

    def running_engines(self) -> tuple[EngineRef, ...]:
        """Return the engines that are up."""
        return tuple(engine.ref for engine in self.all_engines())

    def all_engines(self) -> tuple[SeenEngine, ...]:
        """Return the same, with how they stand."""
        refs = (reference(engine.spec, engine.labels, engine.deployed_at) for engine in self._engines.values())
        return tuple(SeenEngine(ref, RUNNING, "", ref.replicas, (ref.deployed_at,), ref.replicas) for ref in refs)

    def all_jobs(self) -> tuple[SeenJob, ...]:
        """Return the jobs; one that has ended did so when it was submitted."""
        ended = {name: job.submitted_at if job.status in TERMINAL else None for name, (job, _) in self._jobs.items()}
        return tuple(SeenJob(name, job, ended[name]) for name, (job, _) in self._jobs.items())

    def close(self) -> None:
        """Do nothing."""
