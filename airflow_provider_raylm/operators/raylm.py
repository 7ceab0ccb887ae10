"""The tasks of a DAG: one that answers rows, and those by which engines come and go.

Specs do the validating and the cluster does the work; an operator adds what Airflow knows: whose run this is, and who
is told of the outcome.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import XComArg

from airflow_provider_raylm.credentials import storage_of
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.links.raylm import OutputLink, RayJobLink, ServeApplicationLink
from airflow_provider_raylm.naming import fingerprint
from airflow_provider_raylm.observability import announce, collect_lineage, measure_batch, openlineage
from airflow_provider_raylm.operators.base import (
    Command,
    DeferrableRayLMOperator,
    Outcome,
    json_values,
)
from airflow_provider_raylm.operators.checks import (
    renderable,
    require_kinds,
    require_own_outputs,
    require_rule,
    require_storage,
)
from airflow_provider_raylm.operators.engines import (
    DeployEngineOperator,
    SweepEnginesOperator,
    TeardownEngineOperator,
)
from airflow_provider_raylm.operators.owners import (
    installation,
    on_the_engines_cluster,
    require_own,
)
from airflow_provider_raylm.operators.places import assets_of, connections_of, plain
from airflow_provider_raylm.operators.rendering import read_prompts, render_prompts
from airflow_provider_raylm.operators.retries import no_retries_in_vain
from airflow_provider_raylm.operators.templates import require_no_templates
from airflow_provider_raylm.specs import (
    BatchReport,
    BatchSpec,
    EngineRef,
    EngineSpec,
    RuntimeEnv,
    build,
)

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

__all__ = [
    "BatchInferenceOperator",
    "DeployEngineOperator",
    "SweepEnginesOperator",
    "TeardownEngineOperator",
    "installation",
]


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
        runtime_env: a RuntimeEnv, or a dict with its fields, over the engine's own and the connection's.
        storage_conn_id: ids of Airflow connections (aws, google_cloud_platform, wasb, adls) to the storage of source
            and output, one for each kind. None: the cluster's own identity.
        storage_options: options of fsspec's file systems, by protocol: ``{"s3": {"endpoint_url": ...}}``; they go over
            what the connections say, and like them are told to the job alone. They are not rendered.
    """

    template_fields: Collection[str] = ("engine", "batch", "redeploy", "runtime_env", "storage_conn_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"batch": "json"}
    operator_extra_links = (RayJobLink(), ServeApplicationLink(), OutputLink())

    def __init__(
        self,
        *,
        engine: EngineRef | dict[str, Any] | XComArg,
        batch: BatchSpec | dict[str, Any] | XComArg,
        redeploy: EngineSpec | dict[str, Any] | XComArg | None = None,
        runtime_env: RuntimeEnv | dict[str, Any] | XComArg | None = None,
        storage_conn_id: str | Sequence[str] | None = None,
        storage_options: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**on_the_engines_cluster(engine, kwargs))
        require_rule(self, [getattr(engine, "operator", None)])
        self.engine = renderable(EngineRef, engine)
        self.batch = self._renderable_batch(batch)
        require_kinds(self.batch, engine)
        self.redeploy = renderable(EngineSpec, redeploy)
        self.runtime_env = renderable(RuntimeEnv, runtime_env)
        require_storage(storage_conn_id, storage_options)
        self.storage_conn_id = storage_conn_id
        self.storage_options = storage_options or {}
        self._report: BatchReport | None = None
        if self.is_as_written:
            require_own_outputs(self)

    def _renderable_batch(self, batch: Any) -> Any:
        """Return a batch as Airflow can render it; its assets become inlets and outlets unless there are some."""
        if self.is_as_written:
            batch = read_prompts(batch, self.text_env())
        inlets, outlets = assets_of(batch)
        self.inlets, self.outlets = self.inlets or inlets, self.outlets or outlets
        return renderable(BatchSpec, batch)

    @property
    def gone_for_good(self) -> bool:
        """Whether no retry deploys the engine again."""
        return self.redeploy is None

    def _do_render_template_fields(
        self, parent: Any, template_fields: Iterable[str], context: Context, jinja_env: Any, seen_oids: set[int]
    ) -> None:
        with no_retries_in_vain():
            require_no_templates("batch", self.batch, seen_oids)
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)

    def settle(self, context: Context) -> None:
        """Make the rendered batch final, where it is not yet."""

    def command(self, context: Context) -> Command:
        """Return the inference of the rendered spec."""
        if self.engine is None:
            raise SpecError("engine: the deploy task left no reference. Clear the deploy task together with this one.")
        engine = build(EngineRef, plain(self.engine))
        batch = build(BatchSpec, render_prompts(self, plain(self.batch), context))
        # Without what differs when the deploy task has run again and found the engine: the job is the same.
        same = engine.model_copy(
            update={
                "adopted": False,
                "deploy_seconds": 0.0,
                "deployed_at": 0.0,
                "dashboard_url": "",
                "runtime_env": RuntimeEnv(),
            }
        )
        payload: dict[str, Any] = {
            "engine": json_values(same),
            "batch": batch.model_dump(mode="json", exclude_unset=True),
        }
        if batch.max_cost is not None:
            payload["price_per_gpu_hour"] = RayLMHook(self.raylm_conn_id).extra.price_per_gpu_hour
        if self.redeploy is not None:
            spec = build(EngineSpec, plain(self.redeploy))
            require_own(engine, context)
            if fingerprint(spec) != engine.fingerprint:
                raise SpecError(
                    f"redeploy: not the spec that {engine.application} was deployed with (fingerprint "
                    f"{engine.fingerprint}, now {fingerprint(spec)}). Clear the deploy task together with this one."
                )
            payload["redeploy"] = spec.model_dump(mode="json", exclude_unset=True)
        return Command(
            "infer",
            payload,
            application=engine.application,
            output=batch.output,
            lasting=True,
            runtime_env=build(RuntimeEnv, plain(self.runtime_env or {})).over(self._engines_own(engine)),
            storage=storage_of(connections_of(self.batch, self.storage_conn_id), self.storage_options),
        )

    def _engines_own(self, engine: EngineRef) -> RuntimeEnv:
        """Return what the engine was given: of another DAG's engine nothing, whose folders are not here."""
        return engine.runtime_env if engine.labels.dag_id == self.dag_id else RuntimeEnv()

    def finish(self, context: Context, outcome: Outcome) -> dict[str, Any]:
        """Return the BatchReport; measure it, and put it into the events of the outlets and into the lineage."""
        report = self._report = build(BatchReport, outcome.result)
        self.log.info(
            "%d rows in = %d written + %d quarantined + %d already done; %.1f rows/s, %.0f tokens/s; output %s",
            *(report.rows_in, report.rows_written, report.rows_quarantined, report.rows_already_done),
            *(report.rows_per_s, report.tokens_per_s, report.output),
        )
        if report.cut_off or report.reasked or report.truncated_prompts:
            self.log.info(
                "%d prompts truncated; %d answers cut off by max_tokens; %d answers did not fit, and their rows were "
                "asked again",
                *(report.truncated_prompts, report.cut_off, report.reasked),
            )
        measure_batch(context, report)
        announce(context, self.outlets, report)
        collect_lineage(RayLMHook(self.raylm_conn_id), report.source, report.output)
        return json_values(report)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any] | None:
        """Return what was read and written, for the OpenLineage provider, which calls this."""
        return openlineage(self._report) if self._report is not None else None
