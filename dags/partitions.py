"""One engine, one mapped task per input partition: how many there are is known only when the DAG runs."""

from typing import Any

from airflow.sdk import DAG, Param, task

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator

with DAG(
    "raylm_partitions",
    schedule=None,
    params={
        "model": Param("Qwen/Qwen3-8B", type="string"),
        "source": Param("s3://in/reviews", type="string"),
        "output": Param("s3://out/reviews", type="string"),
        "regions": Param(["eu", "us", "apac"], type="array"),
    },
    tags=["raylm"],
):

    @task
    def partitions(params: dict[str, Any]) -> list[dict[str, Any]]:
        """List what to run: one spec per partition."""
        return [
            {
                "source": f"{params['source']}/region={region}",
                "prompt": "Language of this text, as an ISO code:\n${text}\nAnswer:",
                "output_column": "language",
                "max_tokens": 4,
                "output": f"{params['output']}/region={region}",
            }
            for region in params["regions"]
        ]

    specs = partitions()
    with shared_engine("reader", model="{{ params.model }}") as engine:
        BatchInferenceOperator.partial(task_id="language", engine=engine.ref, max_active_tis_per_dagrun=2).expand(
            batch=specs
        )
