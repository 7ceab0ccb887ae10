"""Waiting for an engine that somebody else deploys."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, PokeReturnValue

from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.operators.raylm import installation
from airflow_provider_raylm.specs import EngineRef

if TYPE_CHECKING:
    from airflow.sdk import Context


class EngineSensor(BaseSensorOperator):
    """Waits until an engine of another DAG, run or Airflow can take work, and returns its ``EngineRef``.

    Inference tasks take it as they take a deploy task's. They renew the engine's lease while they work; it stays its
    owner's to tear down, and TeardownEngineOperator refuses to. With several that fit, the one whose run id comes
    last in the alphabet is taken, which is the latest of a schedule.

    Args:
        engine: the engine's name.
        owner_dag_id: the DAG whose engine it is; None for any.
        owner_run_id: the run whose engine it is; None for any.
        owner_installation: the Airflow that deployed it; None for this one.
        raylm_conn_id: connection to the Ray cluster.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.engine = engine
        self.owner_dag_id = owner_dag_id
        self.owner_run_id = owner_run_id
        self.owner_installation = owner_installation
        self.raylm_conn_id = raylm_conn_id

    def poke(self, context: Context) -> PokeReturnValue:
        """Look once.

        Raises:
            ClusterError: the dashboard refuses to answer; Unreachable, if it does not answer.
        """
        with closing(RayLMHook(self.raylm_conn_id).get_conn()) as jobs:
            found = [ref for ref in jobs.running_engines() if self._fits(ref)]
        if not found:
            return PokeReturnValue(is_done=False)
        ref = max(found, key=lambda one: one.labels.run_id)
        self.log.info("found %s of %s, run %s", ref.application, ref.labels.dag_id, ref.labels.run_id)
        return PokeReturnValue(is_done=True, xcom_value=ref.model_dump(mode="json"))

    def _fits(self, ref: EngineRef) -> bool:
        labels = ref.labels
        return (
            labels.engine == self.engine
            and labels.installation == (self.owner_installation or installation())
            and self.owner_dag_id in (None, labels.dag_id)
            and self.owner_run_id in (None, labels.run_id)
        )
