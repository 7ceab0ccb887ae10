"""One engine, one mapped task per input partition: how many there are is known only when the DAG runs."""

from typing import Any

from airflow.sdk import DAG, Param, task

from airflow_provider_raylm.authoring import shared_engine

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
    def partitions(**context: Any) -> list[dict[str, str]]:
        """List the places of each partition."""
        params = context["params"]
        return [
            {"source": f"{params['source']}/region={region}", "output": f"{params['output']}/region={region}"}
            for region in params["regions"]
        ]

    places = partitions()
    with shared_engine("reader", model="{{ params.model }}") as engine:
        engine.infer.partial(
            "language",
            prompt="Language of this text, as an ISO code:\n${text}\nAnswer:",
            max_tokens=4,
            max_active_tis_per_dagrun=2,
        ).expand_kwargs(places)
    # Without this the engine would load, and be paid for, while the list is made.
    places >> engine.deploy
