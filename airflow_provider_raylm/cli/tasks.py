"""A DAG's tasks as they would run now: loaded from a folder, rendered by Airflow, with nothing run before them."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk.api.datamodels._generated import DagRun, TIRunContext
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.sdk.execution_time.context import context_update_for_unmapped
from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

from airflow_provider_raylm.cli.console import choice, last_line
from airflow_provider_raylm.compat import AirflowException
from airflow_provider_raylm.errors import RayLMError, SpecError
from airflow_provider_raylm.operators.base import RayLMOperator
from airflow_provider_raylm.operators.engines import DeployEngineOperator
from airflow_provider_raylm.operators.places import plain
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.specs import EngineSpec, build

if TYPE_CHECKING:
    from airflow.sdk import DAG, BaseOperator, Context

    Task = BaseOperator | MappedOperator

_NOT_RENDERED = ("engine", "redeploy")


class NotRun(SpecError):
    """A field is what another task returns, which has not run."""


@dataclass
class Moment:
    """When, and with what, tasks are rendered.

    Attributes:
        conf: of the run.
        logical_date: of the run.
        map_index: which instance of a mapped task; the first without one.
        xcoms: what tasks have returned, by task id.
        chained: ids of inference tasks whose output a rendered task reads.
    """

    conf: Mapping[str, Any] = field(default_factory=dict)
    logical_date: datetime = field(default_factory=lambda: datetime.now(UTC))
    map_index: int = 0
    xcoms: Mapping[str, Any] = field(default_factory=dict)
    chained: set[str] = field(default_factory=set)


def load_dags(folder: str | None) -> tuple[dict[str, DAG], dict[str, str]]:
    """Return a folder's DAGs by id, and why files could not be imported; None is Airflow's own folder.

    Raises:
        SpecError: there is no such folder.
    """
    # Airflow 3.1 has it elsewhere.
    home = "airflow.dag_processing.dagbag"
    make_bag: Any = import_module(home if find_spec(home) else "airflow.models.dagbag").DagBag
    if folder is not None and not Path(folder).exists():
        raise SpecError(f"There is no folder {folder}.")
    options: dict[str, Any] = {} if folder is None else {"dag_folder": str(Path(folder).resolve())}
    # Before 3.3 Airflow's own examples come with any folder.
    if "include_examples" in inspect.signature(make_bag).parameters:
        options["include_examples"] = False
    with _quiet():
        bag = make_bag(**options)
    return dict(bag.dags), dict(bag.import_errors)


def find_dag(folder: str | None, dag_id: str) -> DAG:
    """Return a DAG of a folder.

    Raises:
        SpecError: there is none; files that could not be imported are named.
    """
    dags, errors = load_dags(folder)
    if dag_id in dags:
        return dags[dag_id]
    broken = "".join(f"\n{path} could not be imported: {last_line(error)}" for path, error in errors.items())
    raise SpecError(f"There is no DAG {dag_id!r}; there are: {choice(dag_id, sorted(dags))}.{broken}")


def tasks_of(dag: DAG) -> Iterator[Task]:
    """Yield the tasks of this package, in the order in which they may run."""
    for task in dag.topological_sort():  # type: ignore[no-untyped-call]
        if issubclass(class_of(task), RayLMOperator):
            yield task


def class_of(task: Any) -> type:
    """Return the class of which a task's instances are."""
    return cast("type", task.operator_class) if isinstance(task, MappedOperator) else type(task)


def inference(dag: DAG, task_id: str) -> Task:
    """Return an inference task of a DAG.

    Raises:
        SpecError: it is none.
    """
    there = {task.task_id: task for task in tasks_of(dag) if issubclass(class_of(task), BatchInferenceOperator)}
    if task_id not in there:
        raise SpecError(f"{dag.dag_id} has no inference task {task_id!r}; there are: {choice(task_id, there)}.")
    return there[task_id]


def rendered(
    task: Task, moment: Moment, *, call: bool = True, changed: Mapping[str, Any] | None = None
) -> tuple[BatchInferenceOperator, Context]:
    """Return an inference task with its fields rendered but for its engine, and the context that it ran in.

    Args:
        task: as the DAG has it.
        moment: when.
        call: call the function of a ``@task.raylm``, which tells its spec.
        changed: fields of the BatchSpec in place of the task's.

    Raises:
        NotRun: a field is what another task returns.
        SpecError: a field cannot be rendered.
    """
    changed = dict(changed or {})
    if changed and not isinstance(task, MappedOperator):
        # Before it is rendered: what they are in place of may be what a task returns that has not run.
        task = copy.copy(task)
        batch = cast("BatchInferenceOperator", task).batch
        cast("BatchInferenceOperator", task).batch = {**batch, **changed} if isinstance(batch, Mapping) else batch
    one, context = _rendered(task, moment, _NOT_RENDERED)
    inferring = cast("BatchInferenceOperator", one)
    inferring.redeploy = None
    if call:
        with authors_own(task):
            inferring.settle(context)
    if changed:
        inferring.batch = {**plain(inferring.batch), **changed}
    return inferring, context


def engine_of(task: Task, moment: Moment) -> EngineSpec | None:
    """Return the rendered spec of the engine that a task's DAG deploys for it; None when another DAG does."""
    deploy = deploy_of(task)
    return None if deploy is None else engine_spec(deploy, moment)


def engine_spec(deploy: Task, moment: Moment) -> EngineSpec:
    """Return the rendered spec of what a task deploys.

    Raises:
        SpecError: it is none.
    """
    one, _ = _rendered(deploy, moment)
    return build(EngineSpec, plain(cast("DeployEngineOperator", one).engine))


def deploy_of(task: Task) -> DeployEngineOperator | None:
    """Return the task that deploys an inference task's engine, if one of the same DAG does."""
    engine = task.partial_kwargs.get("engine") if isinstance(task, MappedOperator) else getattr(task, "engine", None)
    deploy = getattr(engine, "operator", None)
    return deploy if isinstance(deploy, DeployEngineOperator) else None


@contextmanager
def authors_own(task: Task) -> Iterator[None]:
    """Let what goes wrong in a template, a macro or a function of a DAG be an error of the DAG's, not of the command's.

    Raises:
        SpecError: something did; the text says where.
        AirflowException: this Airflow does not know a variable or connection.
    """
    try:
        yield
    except (RayLMError, AirflowException):
        raise
    except AirflowRuntimeError as error:
        raise AirflowException(str(error)) from error
    except Exception as error:
        file = Path(cast("DAG", task.dag).fileloc)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" ({file.name}, line {lines[-1]})" if lines else ""
        raise SpecError(f"{task.task_id} cannot be rendered{where}: {type(error).__name__}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Airflow's log, and what files of DAGs print, out of the results; errors are raised, too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(before)


def _rendered(task: Task, moment: Moment, without: Sequence[str] = ()) -> tuple[BaseOperator, Context]:
    instance = _instance(task, moment)
    with authors_own(task):
        context = instance.get_template_context()
        one, seen = _instance_of(task, context, moment.map_index)
        fields = [name for name in one.template_fields if name not in without]
        # What Airflow does for a task that runs, for fewer fields: an engine that is not there cannot be told.
        with _quiet():
            one._do_render_template_fields(one, fields, context, one.get_template_env(), seen)
    return one, context


def _instance_of(task: Task, context: Context, map_index: int) -> tuple[BaseOperator, set[int]]:
    """Return a task, or an instance of a mapped one, and which of its values are rendered already.

    Raises:
        SpecError: there is no such instance.
    """
    if not isinstance(task, MappedOperator):
        return copy.copy(task), set()
    try:
        mapped, seen = task._expand_mapped_kwargs(context)
    except IndexError:
        raise SpecError(f"{task.task_id} has no instance {map_index}: fewer are mapped.") from None
    one: BaseOperator = task.unmap(mapped)
    context_update_for_unmapped(context, one)
    return one, seen


class _Instance(RuntimeTaskInstance):
    """An instance of a task in a run that is none: before it, no task has run."""

    def xcom_pull(self, task_ids: Any = None, *args: Any, key: str = "return_value", **kwargs: Any) -> Any:
        """Return what a task would return as far as that is known now.

        Raises:
            NotRun: it is not.
        """
        if isinstance(task_ids, str | None):
            return self._returned(str(task_ids), key)
        return [self._returned(one, key) for one in task_ids]

    def get_relevant_upstream_map_indexes(self, *args: Any, **kwargs: Any) -> None:
        """Return that all of what a task returned is meant: no instance of it has run."""

    def _returned(self, task_id: str, key: str) -> Any:
        moment: Moment = self.__dict__["moment"]
        if task_id in moment.xcoms and key == "return_value":
            return moment.xcoms[task_id]
        task = self.task.dag.task_dict.get(task_id)
        if isinstance(task, BatchInferenceOperator) and key == "return_value":
            moment.chained.add(task_id)
            before, _ = rendered(task, moment)
            return {"output": plain(before.batch)["output"]}
        raise NotRun(
            f"what {task_id} returns is not known before it runs. Give it: --xcom {task_id}=JSON, or the source in its "
            "place: --source."
        )


def _instance(task: Task, moment: Moment) -> RuntimeTaskInstance:
    at = moment.logical_date
    names = {"dag_id": task.dag_id, "run_id": f"manual__{at.isoformat()}"}
    of_run: dict[str, Any] = {
        **names,
        **dict.fromkeys(("logical_date", "data_interval_start", "data_interval_end", "run_after", "start_date"), at),
        "end_date": None,
        "clear_number": 0,
        "run_type": "manual",
        "state": "running",
        "conf": dict(moment.conf),
        "consumed_asset_events": [],
        "partition_key": None,
    }
    mapped = isinstance(task, MappedOperator) or task.get_closest_mapped_task_group() is not None
    of_task: dict[str, Any] = {
        **names,
        "id": uuid.uuid4(),
        "task_id": task.task_id,
        "try_number": 1,
        "map_index": moment.map_index if mapped else -1,
        "task": task,
        "start_date": at,
    }
    instance = _Instance.model_construct(**of_task)
    run = DagRun.model_construct(**of_run)
    instance._ti_context_from_server = TIRunContext.model_construct(dag_run=run, max_tries=0, task_reschedule_count=0)
    instance.__dict__["moment"] = moment
    return instance
