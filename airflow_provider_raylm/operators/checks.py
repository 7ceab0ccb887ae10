"""What of a task is checked when its DAG is parsed, before anything is paid for."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from airflow.sdk import TriggerRule
from airflow.sdk.definitions.mappedoperator import MappedOperator

from airflow_provider_raylm.credentials import check_options
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.base import RayLMOperator
from airflow_provider_raylm.operators.places import connections_of, plain
from airflow_provider_raylm.operators.rendering import PROMPT_FILE, without_files
from airflow_provider_raylm.operators.templates import is_deferred, require_templates
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, EngineTask, SpecT, Step, check_unrendered
from airflow_provider_raylm.specs.step import require_kind

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator

    Task = BaseOperator | MappedOperator

FIELDS = (*BatchSpec.model_fields, PROMPT_FILE)
"""What a BatchSpec is made of in a DAG."""


def renderable(spec: type[SpecT], value: Any) -> Any:
    """Return *value* as Airflow can render it, after checking what is known when the DAG is parsed.

    Raises:
        SpecError: a field is bad.
    """
    if isinstance(value, spec):
        value = value.model_dump(mode="json", exclude_unset=True)
    known = without_files(plain(value))
    _require_no_connections(spec, value)
    check_unrendered(spec, known, is_deferred)
    require_templates(spec.__name__, known)
    return value


def _require_no_connections(spec: type[SpecT], value: Any) -> None:
    """Refuse paths that name a connection where only tasks have connections: an engine's place of its model.

    Raises:
        SpecError: there is one.
    """
    named = connections_of(value, None) if spec is not BatchSpec else []
    if named:
        raise SpecError(
            f"{spec.__name__}: a path names the connection {named[0]!r}, which is handed to inference tasks alone. "
            "Leave it out, and give the cluster's nodes an identity, or the engine its credentials by secret_env."
        )


def require_name(engine: str) -> None:
    """Refuse what no engine can be called.

    Raises:
        SpecError: no engine can have that name.
    """
    check_unrendered(EngineSpec, {"name": engine, "model": "any"}, lambda value: False)


def require_rule(task: Task, deploys: Iterable[Any]) -> None:
    """Refuse a trigger rule that Airflow refuses later, in words that tell nobody what to do.

    Args:
        task: a task on an engine.
        deploys: the tasks that it is right behind of, as far as they are known.

    Raises:
        SpecError: it follows a setup task, and runs whatever became of it.
    """
    setup = next((one.task_id for one in deploys if getattr(one, "is_setup", False)), None)
    if setup is not None and not task.is_teardown and task.trigger_rule != TriggerRule.ALL_SUCCESS:
        rule = TriggerRule(task.trigger_rule).value
        raise SpecError(
            f"trigger_rule: {task.task_id} runs on what {setup} sets up, and Airflow lets such a task only have "
            f"all_success. Give {rule!r} to a task before it, outside the engine's `with`: "
            "EmptyOperator(task_id=..., trigger_rule=...)."
        )


def require_kinds(batch: object, engine: object) -> None:
    """Refuse questions that an engine is not loaded for, as far as both are known when the DAG is parsed.

    Args:
        batch: a BatchSpec, or a mapping with its fields.
        engine: the output of the task that deploys the engine.

    Raises:
        SpecError: it cannot be asked one of them.
    """
    spec = plain(getattr(getattr(engine, "operator", None), "engine", None))
    loaded = spec.get("task") or "generate" if isinstance(spec, Mapping) else None
    if loaded is None or loaded not in get_args(EngineTask):
        return
    fields = batch.model_dump() if isinstance(batch, BatchSpec) else batch
    steps = fields.get("steps") or [fields] if isinstance(fields, Mapping) else []
    for step in steps if isinstance(steps, Sequence) else []:
        for kind in Step.kinds if isinstance(step, Mapping) else []:
            if step.get(kind) is not None:
                require_kind(kind, loaded)


def require_storage(conn_ids: object, options: Any) -> None:
    """Refuse connections and options for the storage that a job cannot take over, as far as they are known.

    Args:
        conn_ids: see ``connections_of``.
        options: of fsspec's file systems, by protocol; or None.

    Raises:
        SpecError: it cannot.
    """
    if not is_deferred(conn_ids):
        connections_of(None, conn_ids)
    check_options(options or {})


def require_own_outputs(task: Task) -> None:
    """Refuse an output that another task of the DAG has, as far as that is known when the DAG is parsed.

    Raises:
        SpecError: each would wait for the other, and then refuse what it has written.
    """
    dag = task.get_dag()
    others = [one for one in (dag.tasks if dag is not None else ()) if one.task_id != task.task_id]
    taken = {known_output(batch): one.task_id for one in others for batch in known_batches(one)}
    for batch in known_batches(task):
        output = known_output(batch)
        if output is not None and output in taken:
            whose = f"another task that {task.task_id} is mapped to" if taken[output] == task.task_id else taken[output]
            raise SpecError(f"batch.output: {output} is the output of {whose}, too. Give each task its own.")
        taken[output] = task.task_id


def known_batches(task: Task) -> list[dict[str, Any]]:
    """Return what is known of the BatchSpecs of an inference task, by their fields: one, or for a mapped task several.

    What a mapped task gets from another task is None.
    """
    if not isinstance(task, MappedOperator):
        batch = getattr(task, "batch", None) if isinstance(task, RayLMOperator) else None
        return [batch] if isinstance(batch, dict) else []
    if not issubclass(task.operator_class, RayLMOperator):
        return []
    common, mapped = task.partial_kwargs.get("batch") or {}, task.expand_input.value
    if isinstance(mapped, Mapping):
        unknown: dict[str, Any] = dict.fromkeys(mapped)
        known = [{**unknown, name: one} for name, values in mapped.items() for one in _listed(values)]
        return [_merged(common, one) for one in known or [unknown]]
    if isinstance(mapped, Sequence):
        return [_merged(common, one) for one in mapped if isinstance(one, Mapping)]
    return [{**dict.fromkeys(FIELDS), **common}]


def _listed(values: object) -> Sequence[Any]:
    return values if isinstance(values, Sequence) else ()


def _merged(common: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a mapped task's BatchSpec is made of, of what all have in common and of an instance's arguments."""
    batch = arguments.get("batch") or {}
    batch = plain(batch) if isinstance(batch, BatchSpec) else batch
    if not isinstance(batch, Mapping):
        return {**dict.fromkeys(FIELDS), **common}
    own = {name: one for name, one in arguments.items() if name in FIELDS}
    return {**common, **batch, **(arguments.get("fields") or {}), **own}


def known_output(batch: Any) -> str | None:
    """Return where a task writes, spelt in one way; None when that is known only when it runs."""
    output = plain(batch.get("output")) if isinstance(batch, Mapping) else None
    if not isinstance(output, str) or is_deferred(output):
        return None
    scheme, _, path = output.rpartition("://")
    path = posixpath.normpath(path)
    return f"{scheme}://{path}" if scheme not in ("", "file") else path
