"""One engine, and for each input partition a group of tasks: how many there are is known only at run time."""

from typing import Any

from airflow.sdk import DAG, Param, task, task_group

from airflow_provider_raylm.authoring import shared_engine

with DAG(
    "raylm_partition_groups",
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
            {
                "source": f"{params['source']}/region={region}",
                "languages": f"{params['output']}/languages/region={region}",
                "summaries": f"{params['output']}/summaries/region={region}",
            }
            for region in params["regions"]
        ]

    places = partitions()
    with shared_engine("reader", model="{{ params.model }}") as engine:

        @task_group
        def partition(source: str, languages: str, summaries: str) -> None:
            """Ask two things, the second with the answer to the first."""
            language = engine.infer(
                "language",
                source=source,
                prompt="Language of this text, in one word:\n${text}\nAnswer:",
                max_tokens=4,
                output=languages,
            )
            engine.infer(
                "summary",
                source=language.output,
                prompt="Sum up this text, in ${language}:\n${text}\nSummary:",
                output=summaries,
            )

        partition.expand_kwargs(places)
    # Without this the engine would load, and be paid for, while the list is made.
    places >> engine.deploy
