"""Waiting for an engine that somebody else deploys."""

from __future__ import annotations

import re
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, PokeReturnValue

from airflow_provider_raylm.compat import conf
from airflow_provider_raylm.errors import from_wire
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.operators.checks import require_name
from airflow_provider_raylm.operators.owners import installation
from airflow_provider_raylm.operators.rendering import RendersText
from airflow_provider_raylm.operators.retries import no_retries_in_vain
from airflow_provider_raylm.operators.templates import is_deferred
from airflow_provider_raylm.polling import Unreachable
from airflow_provider_raylm.specs import EngineQuery, EngineRef, build
from airflow_provider_raylm.triggers.raylm import EngineTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context


class EngineSensor(RendersText, BaseSensorOperator):
    """Waits until an engine of another DAG, run or Airflow can take work, and returns its ``EngineRef``.

    Inference tasks take it as they take a deploy task's. They renew the engine's lease while they work; it stays its
    owner's to tear down, and TeardownEngineOperator refuses to. With several that fit, the one that was
    deployed last is taken.

    Args:
        engine: the engine's name.
        owner_dag_id: the DAG whose engine it is; None for any.
        owner_run_id: the run whose engine it is; None for any.
        owner_installation: the Airflow that deployed it; None for this one.
        raylm_conn_id: connection to the Ray cluster.
        deferrable: wait in the triggerer. Default: ``[operators] default_deferrable``.

    Raises:
        SpecError: no engine can have that name.
    """

    template_fields = ("engine", "owner_dag_id", "owner_run_id", "owner_installation")
    ui_color = "#cfe8ff"

    def __init__(
        self,
        *,
        engine: str,
        owner_dag_id: str | None = None,
        owner_run_id: str | None = None,
        owner_installation: str | None = None,
        raylm_conn_id: str = RayLMHook.default_conn_name,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not is_deferred(engine):
            _require_label(engine)
        self.engine = engine
        self.owner_dag_id = owner_dag_id
        self.owner_run_id = owner_run_id
        self.owner_installation = owner_installation
        self.raylm_conn_id = raylm_conn_id
        self.deferrable = deferrable

    @property
    def query(self) -> EngineQuery:
        """Which engine is looked for."""
        return EngineQuery(
            installation=self.owner_installation or installation(),
            dag_id=self.owner_dag_id,
            run_id=self.owner_run_id,
            engine=self.engine,
        )

    def execute(self, context: Context) -> Any:
        """Wait, and return the EngineRef as JSON values.

        Raises:
            SpecError: no engine can have that name.
            ClusterError: the dashboard refuses to answer.
        """
        with no_retries_in_vain():
            _require_label(self.engine)
            return self._wait(context)

    def _wait(self, context: Context) -> Any:
        if not self.deferrable:
            return super().execute(context)
        found = self.poke(context)
        if not found:
            trigger = EngineTrigger(self.raylm_conn_id, self.query.model_dump(), self.poke_interval)
            self.defer(trigger=trigger, method_name=self.resume.__name__, timeout=timedelta(seconds=self.timeout))
        return found.xcom_value

    def poke(self, context: Context) -> PokeReturnValue:
        """Look once. A dashboard that does not answer has no engine for now.

        Raises:
            ClusterError: the dashboard refuses to answer.
        """
        try:
            with closing(RayLMHook(self.raylm_conn_id).get_conn()) as jobs:
                found = self.query.latest(jobs.running_engines())
        except Unreachable as error:
            self.log.warning("%s", error)
            found = None
        return PokeReturnValue(is_done=found is not None, xcom_value=found and self._told(found))

    def resume(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Return the EngineRef that the trigger brought.

        Raises:
            ClusterError: the dashboard refuses to answer.
        """
        with no_retries_in_vain():
            if "error" in event:
                raise from_wire(event["error"])
            return self._told(build(EngineRef, event["engine"]))

    def _told(self, ref: EngineRef) -> dict[str, Any]:
        self.log.info("found %s of %s, run %s", ref.application, ref.labels.dag_id, ref.labels.run_id)
        return ref.model_dump(mode="json")


def _require_label(engine: str) -> None:
    """Refuse what no engine is called: a name, or that of a mapped task group's instance, such as ``a[0]``."""
    require_name(re.sub(r"\[\d+\]$", "", engine) if isinstance(engine, str) else engine)
