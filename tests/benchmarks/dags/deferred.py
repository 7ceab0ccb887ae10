"""As many deferred tasks as asked for, whose jobs do not end."""

from airflow.sdk import DAG, Param, task

from airflow_provider_raylm.operators.raylm import BatchInferenceOperator

LABELS = {"installation": "i", "dag_id": "raylm_deferred", "run_id": "r", "engine": "e"}
ENGINE = {"application": "raylm-e-0", "deployment": "engine", "model": "m", "fingerprint": "f", "labels": LABELS}

with DAG("raylm_deferred", schedule=None, params={"tasks": Param(1, type="integer")}):

    @task
    def batches(params):
        """One batch for each task."""
        return [
            {"source": "in", "prompt": "${text}", "output": f"out-{number}"} for number in range(int(params["tasks"]))
        ]

    BatchInferenceOperator.partial(
        task_id="wait", raylm_conn_id="raylm_deferred", engine={**ENGINE, "lease": {}}, deferrable=True
    ).expand(batch=batches())
