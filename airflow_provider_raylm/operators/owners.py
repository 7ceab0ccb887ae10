"""Whose engine it is: the names by which a run's engine is found again, and never somebody else's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_provider_raylm.compat import conf
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.naming import application_name
from airflow_provider_raylm.operators.checks import require_name
from airflow_provider_raylm.operators.templates import is_deferred
from airflow_provider_raylm.specs import EngineRef, Labels, build

if TYPE_CHECKING:
    from airflow.sdk import Context


def installation() -> str:
    """Return what tells this Airflow from another on the same cluster: its name, else its API server's address.

    Raises:
        SpecError: it has neither: a sweep would take another's engines for its own.
    """
    name = conf.get("raylm", "installation", fallback=None) or conf.get("api", "base_url", fallback=None)
    if not name:
        raise SpecError(
            "This Airflow has no name by which its engines are told from another's on the same cluster. Set "
            "AIRFLOW__RAYLM__INSTALLATION, or [raylm] installation in airflow.cfg, to one that no other Airflow has "
            "(or [api] base_url)."
        )
    return str(name)


def labels_of(context: Context, engine: str) -> Labels:
    """Return the labels of this run's engine of that name."""
    ti = context["ti"]
    return Labels(installation=installation(), dag_id=ti.dag_id, run_id=ti.run_id, engine=_label(context, engine))


def _label(context: Context, engine: str) -> str:
    ti = context["ti"]
    # Each instance of a mapped task group has its own.
    mapped = f"[{ti.map_index}]" if ti.map_index is not None and ti.map_index >= 0 else ""
    return f"{engine}{mapped}"


def deployed(
    name: str, given: str, deploys: Mapping[str, object], context: Context
) -> tuple[str | None, EngineRef | None]:
    """Return the task that deploys this run's engine of that name, and what it has said; None for what is not known.

    Args:
        name: the engine's name.
        given: the name as the DAG has it: rendered now, a template may say something else than for the deploy task.
        deploys: the name, as the DAG has it, of the engine that each deploy task deploys; None where it is not known.
        context: of the task that asks.
    """
    named = [task_id for own in dict.fromkeys((given, name)) for task_id, one in deploys.items() if one == own]
    unknown = [task_id for task_id, one in deploys.items() if task_id not in named and is_deferred(one)]
    for task_id in (*named, *unknown):
        said = context["ti"].xcom_pull(task_ids=task_id)
        ref = build(EngineRef, said) if isinstance(said, dict) else None
        if ref is not None and (task_id in named or ref.labels.engine == _label(context, name)):
            return task_id, ref
    return next(iter(named), None), None


def application_of(name: str, deploys: Mapping[str, object], context: Context) -> str:
    """Return the application that this run's engine of that name has, as no deploy task has said otherwise.

    Args:
        name: the engine's name.
        deploys: as ``deployed`` takes them.
        context: of the task that asks.

    Raises:
        SpecError: no task of this DAG deploys it.
    """
    require_name(name)
    known = [str(one) for one in deploys.values() if not is_deferred(one)]
    if deploys and name not in known and len(known) == len(deploys):
        raise SpecError(f"engine: no task of this DAG deploys an engine named {name!r}; there are {', '.join(known)}.")
    return application_name(labels_of(context, name))


def require_own(ref: EngineRef, context: Context) -> None:
    """Refuse an engine of another DAG or another Airflow.

    Raises:
        SpecError: it is one.
    """
    if (ref.labels.installation, ref.labels.dag_id) != (installation(), context["ti"].dag_id):
        raise SpecError(
            f"engine: {ref.application} belongs to the DAG {ref.labels.dag_id} of {ref.labels.installation}. Only that "
            "one deploys it and tears it down."
        )


def run_is_alive(context: Context, labels: Labels) -> bool:
    """Return whether the run is queued or running; a deleted run is not."""
    alive = context["ti"].get_dr_count(labels.dag_id, run_ids=[labels.run_id], states=["queued", "running"])
    return bool(alive)


def on_the_engines_cluster(engine: object, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a task's arguments with the connection of the task that its engine comes from, unless they have one."""
    conn_id = getattr(getattr(engine, "operator", None), "raylm_conn_id", None)
    return arguments if arguments.get("raylm_conn_id") or conn_id is None else {**arguments, "raylm_conn_id": conn_id}
