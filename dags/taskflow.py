"""Specs that functions make when the DAG runs, from what earlier tasks return and from Airflow's context."""

from typing import Any

from airflow.sdk import DAG, Param

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.specs import BatchSpec

with (
    DAG(
        "raylm_taskflow",
        schedule=None,
        params={
            "model": Param("Qwen/Qwen3-8B", type="string"),
            "source": Param("s3://in/articles", type="string"),
            "output": Param("s3://out/taskflow", type="string"),
        },
        tags=["raylm"],
    ),
    shared_engine("reader", model="{{ params.model }}") as engine,
):

    @engine.task(batch={"prompt": "Sum up in one sentence: ${text}", "output_column": "summary"})
    def summary(**context: Any) -> dict[str, Any]:
        """Return the fields that are known when the DAG runs."""
        params = context["params"]
        return {"source": f"{params['source']}/*.parquet", "output": f"{params['output']}/summary"}

    @engine.task
    def language(summary: Any, **context: Any) -> BatchSpec:
        """Ask about what the summary's report says where it wrote."""
        return BatchSpec(
            source=summary["output"],
            prompt="The language of this text, in one word: ${summary}",
            max_tokens=4,
            output=f"{context['params']['output']}/language",
        )

    language(summary())
