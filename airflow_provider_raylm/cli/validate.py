"""``raylm validate``: what of a folder's tasks cannot work, found before a run pays for an engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from airflow_provider_raylm.cli.connections import opened
from airflow_provider_raylm.cli.console import complain, cut, last_line, say
from airflow_provider_raylm.cli.sources import Trial, trial
from airflow_provider_raylm.cli.tasks import (
    Moment,
    NotRun,
    class_of,
    engine_of,
    engine_spec,
    load_dags,
    rendered,
    tasks_of,
)
from airflow_provider_raylm.compat import AirflowException
from airflow_provider_raylm.decorators.raylm import RayLMDecoratedOperator
from airflow_provider_raylm.errors import RayLMError, SpecError
from airflow_provider_raylm.operators.engines import DeployEngineOperator
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator

if TYPE_CHECKING:
    from airflow_provider_raylm.cli.tasks import Task

_NOTE_CHARACTERS = 300


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each task; 1 if one of them, or a file, is wrong."""
    dags, broken = load_dags(arguments.folder)
    for path, error in sorted(broken.items()):
        say(f"error  {path}: {last_line(error)}")
    wrong = len(broken)
    count = 0
    for _, dag in sorted(dags.items()):
        for task in tasks_of(dag):
            count += 1
            name = f"{dag.dag_id}.{task.task_id}"
            try:
                note = _checked(task, arguments)
            except RayLMError as error:
                wrong += 1
                say(f"error  {name}: {cut(str(error), _NOTE_CHARACTERS)}")
            else:
                say(f"ok     {name}{note and f': {note}'}")
    complain(f"{len(dags)} DAGs, {count} tasks of this package, {wrong} errors")
    return 1 if wrong else 0


def _checked(task: Task, arguments: argparse.Namespace) -> str:
    """Check a task as far as that can be, and return what is to be said of it.

    Raises:
        Exception: it cannot work.
    """
    if not issubclass(class_of(task), BatchInferenceOperator | DeployEngineOperator):
        return ""
    # With the DAG's own defaults: a run may say otherwise.
    moment = Moment()
    try:
        if issubclass(class_of(task), DeployEngineOperator):
            spec = engine_spec(task, moment)
            return f"engine {spec.name}, {spec.model}"
        found = _trial(task, moment)
        if found is not None and (engine := engine_of(task, moment)) is not None:
            found.batch.require_task(engine.task)
    except NotRun as error:
        return f"as far as is known: {cut(str(error).partition('. ')[0], _NOTE_CHARACTERS)}"
    except SpecError:
        # One that is not tried again is an AirflowException, too.
        raise
    # A variable, a connection or a parameter that this Airflow does not have, or a run has to tell.
    except AirflowException as error:
        return f"as far as is known, because it cannot be rendered here: {cut(str(error), _NOTE_CHARACTERS)}"
    if found is None:
        return "as far as is known: its function tells the rest when it runs"
    if not arguments.storage:
        return ""
    if moment.chained:
        return f"its source is what {', '.join(sorted(moment.chained))} writes, which is not looked at"
    with opened(arguments.conn or found.conn_id) as jobs:
        plan = found.plan(jobs)
    rows = "unknown" if plan.rows is None else f"{plan.rows:,}"
    return f"{plan.files:,} files, {rows} rows"


def _trial(task: Task, moment: Moment) -> Trial | None:
    """Return what can be tried of a task; None where its function tells: to call it is a run's business."""
    one, context = rendered(task, moment, call=False)
    return None if isinstance(one, RayLMDecoratedOperator) else trial(one, context)
