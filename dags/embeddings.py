"""Vectors of texts into Parquet, then a class for each text: two models, an engine each, in turn."""

from airflow.sdk import DAG, Param

from airflow_provider_raylm.authoring import shared_engine

with DAG(
    "raylm_embeddings",
    schedule=None,
    params={
        "encoder": Param("BAAI/bge-m3", type="string"),
        "classifier": Param("unitary/toxic-bert", type="string"),
        "source": Param("s3://in/comments/*.parquet", type="string"),
        "output": Param("s3://out/comments", type="string"),
    },
    tags=["raylm"],
):
    with shared_engine("encoder", model="{{ params.encoder }}", task="embed") as encoder:
        vectors = encoder.infer(
            "vectors",
            source="{{ params.source }}",
            embed="${text}",
            output_column="vector",
            # A comment that the model cannot read whole has the vector of its beginning.
            truncate_prompt_tokens=-1,
            truncation_side="right",
            output="{{ params.output }}/vectors",
        )
    with shared_engine("classifier", model="{{ params.classifier }}", task="classify") as classifier:
        classes = classifier.infer(
            "classes",
            # The vectors pass by, into this task's output.
            source=vectors.output,
            classify="${text}",
            output_column="class",
            truncate_prompt_tokens=-1,
            output="{{ params.output }}/classes",
        )
    # One GPU is enough: the second engine starts when the first is gone, and not at all without vectors.
    [vectors, encoder.teardown] >> classifier.deploy
