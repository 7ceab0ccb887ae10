"""Embeddings, classes and scores, as rows and files have them."""

import asyncio

import numpy as np
import pyarrow as pa
import pytest
from airflow.sdk import DAG

from airflow_provider_raylm.authoring import shared_engine
from airflow_provider_raylm.cluster.batch.encoding import encode
from airflow_provider_raylm.cluster.batch.exchange import Answer, RowError
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.repeats import once
from airflow_provider_raylm.cluster.batch.rows import EngineTraits, compile_step
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer, answer_schema
from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, Step
from airflow_provider_raylm.testing import FakeRayJobs
from tests.unit.test_authoring import run


def answered(value, rows=2, **fields):
    """Return the column of a task whose engine gives one value to all rows, and the task's schema."""
    spec = BatchSpec(source="in", output="out", **fields)

    async def ask(question, requests, near):
        return [Answer(value, "", 3, 0) for _ in requests]

    table = pa.table({"a": ["x"] * rows, "b": ["y"] * rows, ROW_ID: list("01")[:rows]})
    came = asyncio.run(BlockAnswerer(spec, EngineTraits("m", 3), ask).answer(table, "block"))
    assert came.rows.schema.equals(answer_schema(spec, table.schema.remove(2), EngineTraits("m", 3)))
    assert came.counts["prompt_tokens"] == 3 * rows
    return came.rows


def test_an_embedding_is_a_list_of_fixed_size():
    """Of floats, or halves where the author says so; also in a file of either format."""
    vector = np.array([0.5, -1, 2], np.float32)
    rows = answered(vector, embed="${a}")

    assert rows.schema.field("response").type == pa.list_(pa.float32(), 3)
    assert rows["response"].to_pylist() == [[0.5, -1, 2]] * 2
    assert answered(vector, embed="${a}", vector_type="float16").schema.field("response").type == pa.list_(
        pa.float16(), 3
    )
    assert answered(vector[:2], embed="${a}", dimensions=2)["response"].to_pylist() == [[0.5, -1]] * 2
    assert encode(rows, "parquet")
    assert b"[0.5,-1" in encode(rows, "jsonl").replace(b" ", b"")


def test_a_class_is_the_likeliest_or_all():
    """With its probability, as a double."""
    classes = [("bad", 0.25), ("good", 0.75)]

    best = {"label": "good", "probability": 0.75}
    assert answered(classes, classify="${a}")["response"].to_pylist() == [best] * 2
    every = answered(classes, classify="${a}", probabilities=True)["response"].to_pylist()
    assert every == [[best, {"label": "bad", "probability": 0.25}]] * 2


def test_a_score_is_of_two_texts():
    """Each by its own template."""
    question = compile_step(Step(score=("${a}", "About ${b}")), EngineTraits("m"))

    assert answered(0.25, score=["${a}", "${b}"])["response"].to_pylist() == [0.25] * 2
    assert question.request({"a": "x", "b": "y"}).content == '["x", "About y"]'
    with pytest.raises(RowError, match="empty"):
        compile_step(Step(score=("${a}", "${b}")), EngineTraits("m")).request({"a": "x", "b": " "})


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"embed": "${a}", "normalize": False}, lambda text: np.full(3, len(text), np.float32)),
        ({"classify": "${a}", "probabilities": True}, lambda text: [("short", 1 / len(text)), ("long", 0.0)]),
        ({"score": ["${a}", "Which?"]}, lambda text: float(len(text))),
    ],
)
def test_equal_texts_are_asked_once(fields, value):
    """Of every kind whose answer is determined, over blocks; each row has its answer, and its count of tokens."""
    asked = []

    async def ask(question, requests, near):
        asked.extend(requests)
        return [Answer(value(request.content), "", 3, 0) for request in requests]

    def answers(way, **given):
        spec = BatchSpec(source="in", output="out", **fields, **given)
        answerer = BlockAnswerer(spec, EngineTraits("m", 3), way)
        tables = [pa.table({"a": list(texts), ROW_ID: list("012")}) for texts in (("x", "yy", "x"), ("yy", "zzz", "x"))]
        return [asyncio.run(answerer.answer(table, "block")).rows for table in tables]

    expected = answers(ask)
    asked.clear()

    assert answers(once(ask), deduplicate=True) == expected
    assert [len(request.content) - len(asked[0].content) for request in asked] == [0, 1, 2]
    assert expected[0]["raylm_prompt_tokens"].to_pylist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"embed": "x", "max_tokens": 5}, "max_tokens: has no effect on embed"),
        ({"embed": "x", "keep": ["token_ids"]}, "keep: has no effect on embed"),
        ({"classify": "x", "dimensions": 5}, "dimensions: has no effect on classify"),
        ({"prompt": "x", "probabilities": True}, "probabilities: has no effect on prompt"),
        ({"score": ["x"]}, "score"),
        ({"embed": "x", "extra_body": {"dimensions": 5}}, r"extra_body\.dimensions: it is a field of its own"),
        ({"embed": "x", "extra_body": {"use_activation": True}}, "use_activation: .* of its own, normalize"),
    ],
)
def test_what_a_kind_does_not_heed_is_refused(fields, words):
    """With the field."""
    with pytest.raises(SpecError, match=words):
        Step(**fields)


def test_an_engine_is_asked_what_it_is_loaded_for():
    """When the DAG is parsed where that is known, else when the task begins."""
    with DAG("d", schedule=None), shared_engine("e", model="m", task="embed") as engine:
        engine.infer("good", source="in", output="out", embed="${a}")
        with pytest.raises(SpecError, match=r"prompt: this engine is loaded for task='embed', which answers embed and"):
            engine.infer("bad", source="in", output="out2", prompt="${a}")
        batch = BatchSpec(source="in", output="out3", steps=[{"classify": "${a}"}])
        with pytest.raises(SpecError, match=r"classify: this engine is loaded for task='embed'"):
            BatchInferenceOperator(task_id="by_hand", engine=engine.ref, batch=batch)
        with pytest.raises(SpecError, match=r"messages: this engine is loaded for task='embed'"):
            engine.infer.partial("mapped", output="out{{ ti.map_index }}").expand(messages=["${a}"], source=["in"])
    with DAG("d2", schedule=None, params={"task": "classify"}), shared_engine("e", model="m", task="{{ params.task }}"):
        pass
    with pytest.raises(SpecError, match="embed: this engine is loaded for task='generate'.*task='embed'"):
        BatchSpec(source="in", output="out", embed="x").require_task("generate")
    with pytest.raises(SpecError, match=r"engine_kwargs.runner: set EngineSpec.task"):
        EngineSpec(name="e", model="m", engine_kwargs={"runner": "pooling"})


def test_the_fake_knows_kinds(airflow_db):
    """A DAG's test sees what a run would meet, and the columns that it writes."""
    with (
        DAG("raylm_kinds", schedule=None) as dag,
        shared_engine("e", model="m", task="embed") as engine,
    ):
        engine.infer("vectors", source="in", output="out", embed="${a}", dimensions=4)
    fake = FakeRayJobs()

    assert set(run(dag, fake).values()) == {"success"}
    assert fake.columns("vectors") == {"vectors": "fixed_size_list<item: float>[4]"}
    with pytest.raises(LookupError, match="no inference task 'vector' was submitted; there is vectors"):
        fake.columns("vector")
    with pytest.raises(LookupError, match="there is none"):
        FakeRayJobs().columns("vectors")
