"""A dozen lines of DAG: one engine, its tasks, and their order, in one ``with``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from airflow.sdk import XComArg

from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.operators.raylm import (
    BatchInferenceOperator,
    DeployEngineOperator,
    TeardownEngineOperator,
)
from airflow_provider_raylm.specs import BatchSpec


@dataclass(frozen=True)
class SharedEngine:
    """The engine inside ``shared_engine``.

    Attributes:
        name: the engine's name.
        deploy: the setup task.
        raylm_conn_id: connection of all its tasks.
        redeploy: the engine's spec if its tasks deploy it again when it is gone.
    """

    name: str
    deploy: DeployEngineOperator
    raylm_conn_id: str
    redeploy: dict[str, Any] | None = None

    @property
    def ref(self) -> XComArg:
        """The EngineRef, for operators made by hand: ``BatchInferenceOperator(engine=engine.ref, ...)``."""
        return self.deploy.output

    def infer(self, task_id: str, **fields: Any) -> BatchInferenceOperator:
        """Add an inference task on this engine.

        Args:
            task_id: the task's id, and the output column unless ``output_column`` or ``steps`` is given.
            **fields: BatchSpec's fields; any other is an argument of the task (``retries``, ``outlets``, ...).

        Raises:
            SpecError: a field that is known when the DAG is parsed is bad.
        """
        batch = {name: value for name, value in fields.items() if name in BatchSpec.model_fields}
        arguments = {name: value for name, value in fields.items() if name not in batch}
        if "steps" not in batch:
            batch.setdefault("output_column", task_id)
        arguments.setdefault("raylm_conn_id", self.raylm_conn_id)
        arguments.setdefault("redeploy", self.redeploy)
        return BatchInferenceOperator(task_id=task_id, engine=self.ref, batch=batch, **arguments)


@contextmanager
def shared_engine(
    name: str,
    *,
    raylm_conn_id: str = RayLMHook.default_conn_name,
    replace: bool = False,
    redeploy: bool = False,
    **fields: Any,
) -> Iterator[SharedEngine]:
    """Give the DAG one engine that lives as long as the tasks inside the ``with`` need it.

    Every task made inside runs after the engine is up and before it is torn down; the teardown also runs when one of
    them fails.

    Args:
        name: the engine's name; the tasks are ``deploy_<name>`` and ``teardown_<name>``.
        raylm_conn_id: connection to the Ray cluster.
        replace: see DeployEngineOperator.
        redeploy: let a task made by ``infer`` deploy the engine again when it is gone; see BatchInferenceOperator.
        **fields: EngineSpec's fields.

    Raises:
        SpecError: a field that is known when the DAG is parsed is bad.
    """
    spec = {"name": name, **fields}
    deploy = DeployEngineOperator(task_id=f"deploy_{name}", engine=spec, replace=replace, raylm_conn_id=raylm_conn_id)
    teardown = TeardownEngineOperator(task_id=f"teardown_{name}", engine=name, raylm_conn_id=raylm_conn_id)
    with teardown.as_teardown(setups=deploy):
        yield SharedEngine(name, deploy, raylm_conn_id, redeploy=spec if redeploy else None)
    # Airflow's own context leaves mapped tasks out: without this the engine would go before they are done.
    users = [task for task in deploy.get_flat_relatives(upstream=False) if task is not teardown]
    for task in users:
        if not any(follower in users for follower in task.downstream_list):
            task.set_downstream(teardown)
