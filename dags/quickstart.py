"""One engine, three inference tasks: two side by side, and one that reads what the first wrote."""

from airflow.sdk import DAG, AssetAlias, Param

from airflow_provider_raylm.authoring import shared_engine

with (
    DAG(
        "raylm_quickstart",
        schedule=None,
        params={
            "model": Param("Qwen/Qwen3-8B", type="string", description="Hugging Face id, or a path on the cluster"),
            "gpus": Param(1, type="number", description="0 runs on CPUs"),
            "engine_kwargs": Param({}, type="object", description="vLLM engine arguments"),
            "source": Param("s3://in/reviews/*.parquet", type="string", description="Files with a column `text`"),
            "output": Param("s3://out/quickstart", type="string", description="Folder for the answers"),
        },
        tags=["raylm"],
    ),
    shared_engine(
        "reviewer",
        model="{{ params.model }}",
        gpus_per_worker="{{ params.gpus }}",
        engine_kwargs="{{ params.engine_kwargs | tojson }}",
    ) as engine,
):
    label = engine.infer(
        "label",
        source="{{ params.source }}",
        prompt="Is this review positive or negative?\n${text}\nAnswer:",
        max_tokens=4,
        temperature=0,
        output="{{ params.output }}/label",
    )
    keywords = engine.infer(
        "keywords",
        source="{{ params.source }}",
        prompt="Product and aspect of this review:\n${text}\nAnswer:",
        max_tokens=16,
        temperature=0,
        output="{{ params.output }}/keywords",
    )
    reply = engine.infer(
        "reply",
        source=label.output,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Answer this ${label} review: ${text}"},
        ],
        max_tokens=32,
        temperature=0,
        # Qwen3 begins a chat with a thought, which 32 tokens would cut off.
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        output="{{ params.output }}/reply",
        # Airflow knows the folder as an asset when the task has written it.
        outlets=[AssetAlias("raylm_replies")],
    )
