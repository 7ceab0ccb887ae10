"""What tests need of Airflow, and 3.1 has in other places than those that came later."""

import functools

import airflow
from airflow.models.taskinstance import clear_task_instances  # noqa: TID251 - the SDK has none
from airflow.sdk.execution_time import supervisor

try:
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.sdk.exceptions import TaskDeferred
    from airflow.sdk.lineage import HookLineageCollector
except ImportError:
    from airflow.exceptions import TaskDeferred
    from airflow.lineage.hook import HookLineageCollector
    from airflow.models.dagbag import DagBag, sync_bag_to_db  # noqa: TID251 - the SDK has none

AIRFLOW = tuple(int(part) for part in airflow.__version__.split(".")[:2])

if AIRFLOW < (3, 3):
    # As 3.3 does: the tasks of a process share one API server, which takes seconds to make.
    supervisor.in_process_api_server = functools.cache(supervisor.in_process_api_server)

__all__ = ["AIRFLOW", "DagBag", "HookLineageCollector", "TaskDeferred", "clear_task_instances", "sync_bag_to_db"]
