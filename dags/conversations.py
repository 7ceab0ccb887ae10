"""A turn more for conversations of several turns, which a column holds; each row tells how long the turn may be."""

from airflow.sdk import DAG, Param

from airflow_provider_raylm.authoring import shared_engine

with (
    DAG(
        "raylm_conversations",
        schedule=None,
        params={
            "model": Param("Qwen/Qwen3-8B", type="string"),
            "source": Param("s3://in/conversations/*.parquet", type="string"),
            "output": Param("s3://out/conversations", type="string"),
        },
        tags=["raylm"],
    ),
    # The parser takes the model's thoughts out of its answers; they have a column of their own.
    shared_engine(
        "assistant", model="{{ params.model }}", engine_kwargs={"reasoning_parser": "qwen3", "max_model_len": 16_384}
    ) as engine,
):
    engine.infer(
        "reply",
        source="{{ params.source }}",
        messages=[{"role": "system", "content": "You are a helpful assistant."}, "${conversation}"],
        # Room for the thoughts, too.
        max_tokens="${budget}",
        on_length="fail",
        keep=["reasoning"],
        output="{{ params.output }}/reply",
    )
