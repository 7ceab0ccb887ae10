"""Every hour: delete engines whose run is over, or that are older than a day."""

from datetime import timedelta

import pendulum
from airflow.sdk import DAG

from airflow_provider_raylm.operators.raylm import SweepEnginesOperator

with DAG(
    "raylm_sweep_engines",
    schedule="@hourly",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    tags=["raylm"],
):
    SweepEnginesOperator(task_id="sweep", max_age=timedelta(days=1))
