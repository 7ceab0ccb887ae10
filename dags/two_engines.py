"""Two engines in one run: a small model sorts, a large one writes; each lives only as long as its own tasks."""

from airflow.sdk import DAG, Param

from airflow_provider_raylm.authoring import shared_engine

with DAG(
    "raylm_two_engines",
    schedule=None,
    params={
        "small": Param("Qwen/Qwen3-0.6B", type="string"),
        "large": Param("Qwen/Qwen3-32B", type="string"),
        "source": Param("s3://in/tickets/*.jsonl", type="string"),
        "output": Param("s3://out/tickets", type="string"),
    },
    tags=["raylm"],
):
    with shared_engine("sorter", model="{{ params.small }}") as sorter:
        topic = sorter.infer(
            "topic",
            source="{{ params.source }}",
            prompt="Topic of this ticket in one word:\n${text}\nTopic:",
            max_tokens=8,
            output="{{ params.output }}/topic",
        )
    with shared_engine("writer", model="{{ params.large }}", tensor_parallel_size=2) as writer:
        writer.infer(
            "draft",
            source=topic.output,
            messages=[{"role": "user", "content": "Draft an answer to this ${topic} ticket:\n${text}"}],
            max_tokens=512,
            output="{{ params.output }}/draft",
        )
    # Without this the large engine would load, and hold its GPUs, while the small one still works.
    topic >> writer.deploy
