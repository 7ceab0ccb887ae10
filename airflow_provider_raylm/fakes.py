"""What the jobs of a cluster that is not there come to: for ``testing.FakeRayJobs``, whose unit tests users write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_raylm.errors import BatchError, EngineError, EngineGone
from airflow_provider_raylm.inventory import reference
from airflow_provider_raylm.naming import application_name, fingerprint
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.sealing import seal
from airflow_provider_raylm.specs import (
    BatchReport,
    BatchSpec,
    EngineInfo,
    EngineRef,
    EngineSpec,
    EngineUsage,
    Labels,
    SweepReport,
    TeardownReport,
    Value,
    build,
)
from airflow_provider_raylm.specs.previews import PlanReport, PreviewReport, PreviewRow, RowCounts


@dataclass
class FakeEngine:
    """An engine that is up."""

    spec: EngineSpec
    labels: Labels
    usage: EngineUsage = field(default_factory=EngineUsage)
    deployed_at: float = field(default_factory=time.time)


class FakeVerbs:
    """The verbs, on engines that are names."""

    def __init__(self) -> None:
        self.deployed: list[str] = []
        self.batches: dict[str, BatchSpec] = {}
        self._engines: dict[str, FakeEngine] = {}
        self._reports: dict[str, dict[str, Any]] = {}

    def verbs(self) -> dict[str, Callable[[dict[str, Any], JobRequest], Value]]:
        """Return what each verb does with a payload and its request."""
        return {
            "deploy": self._deploy,
            "infer": self._infer,
            "plan": self._plan,
            "preview": self._preview,
            "teardown": self._teardown,
            "sweep": self._sweep,
        }

    def _deploy(self, payload: dict[str, Any], request: JobRequest) -> Value:
        spec, labels = build(EngineSpec, payload["engine"]), build(Labels, payload["labels"])
        application = application_name(labels)
        there = self._engines.get(application)
        adopted = there is not None and fingerprint(there.spec) == fingerprint(spec)
        if there is not None and not adopted and not payload["replace"]:
            raise EngineError(
                f"{application} is running with another spec (fingerprint {fingerprint(there.spec)}, now asked for "
                f"{fingerprint(spec)})."
            )
        if not adopted:
            self._engines[application] = FakeEngine(spec, labels)
            self.deployed.append(spec.name)
        engine = self._engines[application]
        return reference(engine.spec, engine.labels, engine.deployed_at).model_copy(update={"adopted": adopted})

    def _infer(self, payload: dict[str, Any], request: JobRequest) -> Value:
        spec, ref = build(BatchSpec, payload["batch"]), build(EngineRef, payload["engine"])
        task_id = request.metadata.get("task_id", "")
        self.batches[task_id] = spec
        if "redeploy" in payload and ref.application not in self._engines:
            self._deploy({"engine": payload["redeploy"], "labels": ref.labels, "replace": False}, request)
        spec.require_task(ref.task)
        spec.paid_seconds(ref.gpus, payload.get("price_per_gpu_hour"))
        engine = self._require_there(ref)
        report = BatchReport(
            source=spec.sources,
            output=spec.output,
            quarantine=spec.quarantine_uri,
            application=ref.application,
            model=ref.model,
            fingerprint=fingerprint(spec),
            **(self._reports.get(task_id) or {"rows_in": 1, "rows_written": 1, "rows_quarantined": 0}),
        )
        engine.usage = engine.usage.plus(report)
        return report

    def _plan(self, payload: dict[str, Any], request: JobRequest) -> Value:
        build(BatchSpec, payload["batch"])
        return self._planned(request)

    def _planned(self, request: JobRequest) -> PlanReport:
        rows = self._reports.get(request.metadata.get("task_id", ""), {}).get("rows_in", 1)
        return PlanReport(files=1, rows=rows, bytes=0, columns={}, answers={})

    def _preview(self, payload: dict[str, Any], request: JobRequest) -> Value:
        """Answer as many rows as were asked for, or are there, each with two tokens in and one out."""
        spec, ref = build(BatchSpec, payload["batch"]), build(EngineRef, payload["engine"])
        spec.require_task(ref.task)
        self._require_there(ref)
        if payload["texts"] and not request.pad:
            raise BatchError("preview: nobody has said how to hide the rows from the job's log.")
        plan = self._planned(request)
        count = min(payload["rows"], plan.rows or 0)
        answer = {column: "an answer" for step in spec.all_steps for column in step.output_columns}
        rows = [PreviewRow(row_id=f"{row}", asked=("a question",), answer=answer) for row in range(count)]
        text = json.dumps([row.model_dump() for row in rows])
        counts = (RowCounts(prompt_tokens=2, completion_tokens=1, seconds=0.5),) * count
        return PreviewReport(
            plan=plan,
            counts=counts,
            seconds=0.5,
            capacity=256,
            replicas=ref.replicas,
            sealed=seal(text, request.pad) if payload["texts"] else "",
        )

    def _require_there(self, ref: EngineRef) -> FakeEngine:
        engine = self._engines.get(ref.application)
        if engine is None:
            raise EngineGone(f"The engine {ref.application} is gone. Clear the deploy task together with this one.")
        return engine

    def _teardown(self, payload: dict[str, Any], request: JobRequest) -> Value:
        engine = self._engines.pop(payload["application"], None)
        return TeardownReport(
            application=payload["application"],
            existed=engine is not None,
            usage=engine.usage if engine else EngineUsage(),
            resources_free=True,
        )

    def _sweep(self, payload: dict[str, Any], request: JobRequest) -> Value:
        found = tuple(
            EngineInfo(
                application=application,
                status="RUNNING",
                fingerprint=fingerprint(engine.spec),
                labels=engine.labels,
                age_seconds=0.0,
                usage=engine.usage,
            )
            for application, engine in sorted(self._engines.items())
            if engine.labels.installation == payload["installation"]
        )
        deleted = tuple(info.application for info in found if info.application in payload["delete"])
        for application in deleted:
            del self._engines[application]
        return SweepReport(engines=found, deleted=deleted)
