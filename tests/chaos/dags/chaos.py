"""What the faults that concern Airflow happen to: a task on an engine that is there, and a run with its own."""

import os
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Param, task

from airflow_provider_raylm.operators.raylm import (
    BatchInferenceOperator,
    DeployEngineOperator,
    TeardownEngineOperator,
)
from airflow_provider_raylm.sensors.raylm import EngineSensor

KWARGS = {
    "params": {"engine": Param({}, type="object"), "batch": Param({}, type="object")},
    "default_args": {
        "raylm_conn_id": "raylm_chaos",
        "deferrable": False,
        "poll_interval": 1,
        "retries": 3,
        "retry_delay": timedelta(seconds=1),
    },
}
ENGINE, BATCH = "{{ params.engine | tojson }}", "{{ params.batch | tojson }}"


def note_process(context):
    """Let the fault find the process that runs the task."""
    Path(f"{context['params']['batch']['output']}.pid").write_text(str(os.getpid()))


for dag_id, how in (
    ("chaos_on_an_engine", {"deferrable": False}),
    ("chaos_deferred", {"deferrable": True}),
    ("chaos_on_an_engine_in_time", {"deferrable": False, "execution_timeout": timedelta(seconds=30), "retries": 0}),
    ("chaos_deferred_in_time", {"deferrable": True, "execution_timeout": timedelta(seconds=30), "retries": 0}),
):
    with DAG(dag_id, schedule=None, **KWARGS):
        BatchInferenceOperator(task_id="work", engine=ENGINE, batch=BATCH, on_execute_callback=note_process, **how)

with DAG("chaos_gated", schedule=None, **KWARGS):
    BatchInferenceOperator(task_id="work", engine=ENGINE, batch=BATCH, deferrable=True, raylm_conn_id="raylm_gated")

with DAG("chaos_finds", schedule=None, **KWARGS):
    find = EngineSensor(task_id="find", engine="late", owner_dag_id="chaos", deferrable=True, poke_interval=2)
    BatchInferenceOperator(task_id="work", engine=find.output, batch=BATCH)

for dag_id, timeout, redeploy in (
    ("chaos_with_its_own", timedelta(seconds=float(os.environ["CHAOS_RUN_TIMEOUT_S"])), None),
    ("chaos_redeploys", None, ENGINE),
):
    with DAG(dag_id, schedule=None, dagrun_timeout=timeout, **KWARGS):
        deploy = DeployEngineOperator(task_id="deploy", engine=ENGINE)
        work = BatchInferenceOperator(task_id="work", engine=deploy.output, batch=BATCH, redeploy=redeploy)
        deploy >> work >> TeardownEngineOperator(task_id="teardown", engine=deploy.output).as_teardown(setups=deploy)

with DAG("chaos_partitions", schedule=None, **KWARGS):

    @task
    def partitions(params, run_id):
        """One batch for each source."""
        batch = params["batch"]
        return [{**batch, "source": one, "output": f"{one}-{run_id}"} for one in batch["source"]]

    batches = partitions()
    deploy = DeployEngineOperator(task_id="deploy", engine=ENGINE, deferrable=True)
    work = BatchInferenceOperator.partial(task_id="work", engine=deploy.output, deferrable=True)
    teardown = TeardownEngineOperator(task_id="teardown", engine=deploy.output, deferrable=True)
    deploy >> work.expand(batch=batches) >> teardown.as_teardown(setups=deploy)
