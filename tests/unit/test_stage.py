"""A block of rows, and what an engine made of a function says to it."""

import asyncio

import pyarrow as pa
import pytest

from airflow_provider_raylm.cluster.batch.encoding import encode
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.batch.stage import REASON, BlockAnswerer
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchSpec
from tests.scripted import asking, shouts


def spec(tmp_path, **fields):
    defaults = {"prompt": "${text}", "source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    return BatchSpec.model_validate({**defaults, **fields})


def table(*texts, **columns):
    ids = [f"id{i}" for i in range(len(texts))]
    return pa.table({"text": pa.array(texts, pa.string()), **columns, ROW_ID: ids})


def answer(task, rows):
    came = asyncio.run(BlockAnswerer(task, EngineTraits("m"), asking(shouts)).answer(rows, "block"))
    return came.rows, came.failed


def test_every_row_ends_in_one_of_two_tables(tmp_path):
    """Answered rows keep their columns and types; failed ones come as they went, with the reason."""
    answered, failed = answer(spec(tmp_path), table("a", "bad", None, " ", "b", n=pa.array([1, 2, 3, 4, 5], pa.int8())))

    assert answered.select(["text", "n", "response", ROW_ID]).to_pylist() == [
        {"text": "a", "n": 1, "response": "A", ROW_ID: "id0"},
        {"text": "b", "n": 5, "response": "B", ROW_ID: "id4"},
    ]
    assert answered.schema.field("n").type == pa.int8()
    assert {row[ROW_ID]: row["raylm_reason"] for row in failed.to_pylist()} == {
        "id1": "invalid_request",
        "id2": "null_value",
        "id3": "empty_prompt",
    }
    assert failed.column_names == ["text", "n", ROW_ID, "raylm_reason", "raylm_message"]


def test_steps_see_what_earlier_ones_produced(tmp_path):
    """Tokens add up over the steps; a row that failed is not asked again."""
    steps = [{"prompt": "${text}", "output_column": "one"}, {"prompt": "${text}+${one}", "output_column": "two"}]
    answered, failed = answer(spec(tmp_path, prompt=None, steps=steps), table("a", "bad"))

    assert answered.select(["one", "two", "raylm_prompt_tokens", "raylm_completion_tokens"]).to_pylist() == [
        {"one": "A", "two": "A+A", "raylm_prompt_tokens": 4, "raylm_completion_tokens": 6}
    ]
    assert failed[ROW_ID].to_pylist() == ["id1"]


def shorten(row):
    """Row function: adds a column, drops one, and cannot bear "c"."""
    if row["text"] == "c":
        raise LookupError("no c")
    return {"text": row["text"], "short": row["text"][:1], "n": row["n"]}


def shout(row):
    """Row function: changes the answer."""
    return {**row, "response": row["response"] + "!"}


def test_row_functions(tmp_path):
    """They may change anything but the row's identity; what one raises fails its row."""
    task = spec(
        tmp_path, prompt="${short}", columns=["text"], preprocess=f"{__name__}:shorten", postprocess=f"{__name__}:shout"
    )
    answered, failed = answer(task, table("abc", "c", n=pa.array([1, 2], pa.int8())))

    assert answered.select(["text", "short", "response", ROW_ID]).to_pylist() == [
        {"text": "abc", "short": "a", "response": "A!", ROW_ID: "id0"}
    ]
    assert "n" not in answered.column_names
    assert failed.select(["raylm_reason", "raylm_message"]).to_pylist() == [
        {"raylm_reason": "row_function", "raylm_message": "LookupError: no c"}
    ]


STRANGE = [1, "x", {"a": 1}, {}, 2**70, None, "\ud800", object()]


def make_strange(row):
    return {**row, "made": STRANGE[row["i"]], "text": STRANGE[row["i"]] if row["i"] < 2 else row["text"]}


def test_strange_results_of_a_row_function_fail_no_other_row(tmp_path):
    """What fits no common type becomes text; what no file can hold fails its row."""
    task = spec(tmp_path, preprocess=f"{__name__}:make_strange")
    rows = table(*["t"] * len(STRANGE), i=list(range(len(STRANGE))))
    answered, failed = answer(task, rows)
    assert encode(answered, "parquet").startswith(b"PAR1")

    assert answered["made"].to_pylist() == ["1", "x", '{"a": 1}', "{}", str(2**70), None]
    assert answered["text"].to_pylist() == ["1", "x", "t", "t", "t", "t"]
    assert [(row["i"], row[REASON]) for row in failed.to_pylist()] == [(6, "row_function"), (7, "row_function")]


def test_a_row_function_that_is_not_there_is_named(tmp_path):
    """The error says that the cluster has to import it."""
    with pytest.raises(BatchError, match=r"preprocess: cannot import no\.such:thing on the cluster"):
        BlockAnswerer(spec(tmp_path, preprocess="no.such:thing"), EngineTraits("m"), asking(shouts))


def test_a_column_that_only_some_file_lacks_is_fatal(tmp_path):
    """It is the author's mistake, not the row's."""
    with pytest.raises(BatchError, match="a row has no column 'text'|no column 'text'"):
        answer(spec(tmp_path), pa.table({"other": ["x"], ROW_ID: ["1"]}))


@pytest.mark.parametrize("steps", [1, 2])
async def test_the_steps_of_a_block_belong_together(steps, tmp_path):
    """What a later one asks begins with what the first one asked; a single one may be answered anywhere."""
    places = []

    async def ask(question, requests, near=None):
        places.append(near)
        return shouts(question, [request.content for request in requests])

    questions = [{"prompt": "${text}", "output_column": name} for name in "ab"[:steps]]
    await BlockAnswerer(spec(tmp_path, prompt=None, steps=questions), EngineTraits("m"), ask).answer(
        table("x"), "00000-000000256"
    )

    assert places == ([None] if steps == 1 else ["00000-000000256"] * 2)
