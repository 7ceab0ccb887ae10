"""A dozen lines of DAG: one engine, its tasks, and their order, in one ``with``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

from airflow.sdk import XComArg
from airflow.sdk.definitions.mappedoperator import MappedOperator

from airflow_provider_raylm.decorators.raylm import raylm_task
from airflow_provider_raylm.keywords import (
    DecoratedArguments,
    DeployArguments,
    EngineFields,
    InferArguments,
    TeardownArguments,
)
from airflow_provider_raylm.operators.checks import FIELDS, require_own_outputs, require_rule
from airflow_provider_raylm.operators.mapped import PartialInference
from airflow_provider_raylm.operators.raylm import (
    BatchInferenceOperator,
    DeployEngineOperator,
    TeardownEngineOperator,
)
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, with_new_names

if TYPE_CHECKING:
    from airflow.sdk.bases.decorator import FParams, FReturn
    from airflow.sdk.bases.decorator import Task as DecoratedTask
    from airflow.sdk.bases.operator import BaseOperator

    Task = BaseOperator | MappedOperator


@dataclass(frozen=True)
class Inference:
    """What adds inference tasks to an engine.

    Attributes:
        engine: the EngineRef.
        defaults: arguments of its tasks, unless they say otherwise.
    """

    engine: XComArg
    defaults: Mapping[str, Any]

    def __call__(self, task_id: str, **fields: Unpack[InferArguments]) -> BatchInferenceOperator:
        """Add an inference task.

        Args:
            task_id: the task's id, and the output column unless ``output_column`` or ``steps`` is given.
            **fields: BatchSpec's fields, and ``prompt_file``, the name of a file with the prompt; any other is an
                argument of the task (``retries``, ``outlets``, ...).

        Raises:
            SpecError: a field that is known when the DAG is parsed is bad.
        """
        batch, arguments = self._split(task_id, fields)
        return BatchInferenceOperator(task_id=task_id, batch=batch, **arguments)

    def partial(self, task_id: str, **fields: Unpack[InferArguments]) -> PartialInference:
        """Return an inference task without the fields that its ``expand`` or ``expand_kwargs`` maps.

        Args:
            task_id: see ``infer``.
            **fields: see ``infer``. Each of the tasks needs an ``output`` of its own: a mapped one, or one with
                ``{{ ti.map_index }}``.

        Raises:
            SpecError: a field that is known when the DAG is parsed is bad.
        """
        return PartialInference(task_id, *self._split(task_id, fields))

    def _split(self, task_id: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        fields = with_new_names(BatchSpec, fields)
        batch = {name: value for name, value in fields.items() if name in FIELDS}
        if "steps" not in batch:
            batch.setdefault("output_column", task_id)
        arguments = {name: value for name, value in fields.items() if name not in batch}
        return batch, {**self.defaults, "engine": self.engine, **arguments}


@dataclass(frozen=True)
class SharedEngine:
    """The engine inside ``shared_engine``.

    Attributes:
        name: the engine's name.
        deploy: the setup task.
        teardown: the teardown task.
        redeploy: the engine's spec if its tasks deploy it again when it is gone.
        storage_conn_id: of its tasks, unless they say otherwise.
    """

    name: str
    deploy: DeployEngineOperator
    teardown: TeardownEngineOperator
    redeploy: dict[str, Any] | None = None
    storage_conn_id: str | Sequence[str] | None = None

    @property
    def ref(self) -> XComArg:
        """The EngineRef, for operators made by hand (``BatchInferenceOperator(engine=engine.ref, ...)``)."""
        return self.deploy.output

    @property
    def infer(self) -> Inference:
        """Adds inference tasks on this engine: ``infer(task_id, ...)``, ``infer.partial(task_id, ...).expand(...)``."""
        defaults = {"redeploy": self.redeploy, "storage_conn_id": self.storage_conn_id}
        return Inference(self.ref, defaults)

    @overload
    def task(self, python_callable: Callable[FParams, FReturn]) -> DecoratedTask[FParams, FReturn]: ...

    @overload
    def task(
        self, python_callable: None = None, **arguments: Unpack[DecoratedArguments]
    ) -> Callable[[Callable[FParams, FReturn]], DecoratedTask[FParams, FReturn]]: ...

    def task(self, python_callable: Callable[..., Any] | None = None, **arguments: Any) -> Any:
        """Make an inference task on this engine of a function that returns its BatchSpec: ``@engine.task``.

        Args:
            python_callable: the function; with arguments, what this returns takes it.
            **arguments: see ``RayLMDecoratedOperator``.
        """
        arguments.setdefault("redeploy", self.redeploy)
        arguments.setdefault("storage_conn_id", self.storage_conn_id)
        return raylm_task(python_callable, engine=self.ref, **arguments)


@contextmanager
def shared_engine(
    name: str,
    *,
    raylm_conn_id: str | None = None,
    replace: bool = False,
    redeploy: bool = False,
    storage_conn_id: str | Sequence[str] | None = None,
    deploy_args: DeployArguments | None = None,
    teardown_args: TeardownArguments | None = None,
    **fields: Unpack[EngineFields],
) -> Iterator[SharedEngine]:
    """Give the DAG one engine that lives as long as the tasks inside the ``with`` need it.

    Every task made inside runs after the engine is up and before it is torn down; the teardown also runs when one of
    them fails.

    Args:
        name: the engine's name; the tasks are ``deploy_<name>`` and ``teardown_<name>``.
        raylm_conn_id: connection to the Ray cluster, of all tasks on this engine; None for that of the DAG's
            ``default_args``, else the hook's default.
        replace: see DeployEngineOperator.
        redeploy: let a task made by ``infer`` deploy the engine again when it is gone; see BatchInferenceOperator.
        storage_conn_id: of the tasks that ``infer`` and ``task`` make; see BatchInferenceOperator.
        deploy_args: further arguments of the deploy task, such as ``retries``, ``pool`` or ``deferrable``.
        teardown_args: of the teardown task, also ``on_busy`` and ``drain_timeout``.
        **fields: EngineSpec's fields.

    Raises:
        SpecError: a field that is known when the DAG is parsed is bad, or the DAG has an engine of that name.
    """
    spec = {"name": name, **with_new_names(EngineSpec, fields)}
    connection = {} if raylm_conn_id is None else {"raylm_conn_id": raylm_conn_id}
    deploy = DeployEngineOperator(
        task_id=f"deploy_{name}", engine=spec, replace=replace, **{**connection, **(deploy_args or {})}
    )
    teardown = TeardownEngineOperator(
        task_id=f"teardown_{name}",
        engine=name,
        **cast("dict[str, Any]", {"raylm_conn_id": deploy.raylm_conn_id, **(teardown_args or {})}),
    )
    others = set(deploy.dag.task_ids)
    with teardown.as_teardown(setups=deploy):
        yield SharedEngine(name, deploy, teardown, spec if redeploy else None, storage_conn_id)
    _enclose(deploy, teardown, [task for task in deploy.dag.tasks if task.task_id not in others])


def _enclose(deploy: Task, teardown: Task, inside: Sequence[Task]) -> None:
    """Have all tasks that were made inside, and all that use the engine, run between its start and its end.

    Airflow's own context leaves mapped tasks out.
    """
    # Those of a context around this one.
    after = {task.task_id for task in teardown.get_flat_relatives(upstream=False)}
    users = {task.task_id: task for task in (*inside, *deploy.get_flat_relatives(upstream=False))}
    users = {name: task for name, task in users.items() if name not in {*after, teardown.task_id}}
    for task in users.values():
        first = not task.upstream_task_ids & {*users, deploy.task_id}
        require_rule(task, [deploy] if first or deploy.task_id in task.upstream_task_ids else [])
        if isinstance(task, MappedOperator):
            require_own_outputs(task)
        if first:
            task.set_upstream(deploy)
        if not task.downstream_task_ids & {*users, teardown.task_id}:
            task.set_downstream(teardown)
