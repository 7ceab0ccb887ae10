"""Two fine-tunes of one model on one engine: a task has one of them, the other's rows say which they want."""

from airflow.sdk import DAG, Param

from airflow_provider_raylm.authoring import shared_engine

with (
    DAG(
        "raylm_adapters",
        schedule=None,
        params={
            "model": Param("Qwen/Qwen3-8B", type="string"),
            "adapters": Param("s3://models/adapters", type="string"),
            "source": Param("s3://in/letters/*.parquet", type="string"),
            "output": Param("s3://out/letters", type="string"),
        },
        tags=["raylm"],
    ),
    shared_engine(
        "writer",
        model="{{ params.model }}",
        adapters={"legal": "{{ params.adapters }}/legal", "friendly": "{{ params.adapters }}/friendly"},
        # Of LoRA adapters with up to so many ranks.
        engine_kwargs={"max_lora_rank": 16},
    ) as engine,
):
    checked = engine.infer(
        "checked",
        source="{{ params.source }}",
        prompt="What does this letter promise?\n${text}\nIt promises",
        adapter="legal",
        output_column="promises",
        output="{{ params.output }}/checked",
    )
    engine.infer(
        "reply",
        source=checked.output,
        messages=[{"role": "user", "content": "Answer this letter, which promises ${promises}:\n${text}"}],
        # A column of the letters: legal or friendly.
        adapter="${style}",
        output="{{ params.output }}/reply",
    )
