"""What reviews say, as columns of their own type: a schema for the first task, one of a few words for the second."""

from airflow.sdk import DAG, Param

from airflow_provider_raylm.authoring import shared_engine

FACTS = {
    "type": "object",
    "properties": {
        "product": {"type": "string"},
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
        "bought": {"type": ["string", "null"], "format": "date"},
        "complaints": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["product", "rating", "complaints"],
    "additionalProperties": False,
}

with (
    DAG(
        "raylm_typed_extraction",
        schedule=None,
        params={
            "model": Param("Qwen/Qwen3-8B", type="string"),
            "source": Param("s3://in/reviews/*.parquet", type="string"),
            "output": Param("s3://out/typed", type="string"),
        },
        tags=["raylm"],
    ),
    shared_engine("reader", model="{{ params.model }}") as engine,
):
    facts = engine.infer(
        "facts",
        source="{{ params.source }}",
        prompt="The product, the rating from 1 to 5, the day of purchase and the complaints of a review, as JSON.\n"
        "Review: ${text}\nJSON: ",
        output_schema=FACTS,
        # A long review has many complaints: an answer that is cut off does not fit, and is asked for once more.
        max_tokens=400,
        temperature=0,
        output="{{ params.output }}/facts",
    )
    urgency = engine.infer(
        "urgency",
        source=facts.output,
        prompt="A customer says: ${facts}\nHow urgent is an answer? It is ",
        choice=["urgent", "normal", "not needed"],
        max_tokens=8,
        temperature=0,
        output="{{ params.output }}/urgency",
    )
