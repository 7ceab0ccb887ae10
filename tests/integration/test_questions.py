"""All that a row may be asked, on the real engine: row by row what vLLM alone answers."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from airflow_provider_raylm.errors import BatchError
from tests.integration.conftest import CHOICE, GRAMMAR, MAX_TOKENS, REGEX, ROWS, SCHEMA
from tests.offline import TYPED_TOKENS, own_of, tool_of

CUT_TOKENS = 12
CUT = {"truncate_prompt_tokens": CUT_TOKENS, "truncation_side": "left"}
# Many at a time, and all in one.
BLOCKS = [7, ROWS]
KEEP = ["token_ids", "prompt_token_ids", "logprobs"]
GREEDY = {"temperature": 0, "max_tokens": MAX_TOKENS}


@pytest.fixture
def infer(cluster, engine, source, tmp_path):
    """Run an inference task; return its report and the rows of its output in order."""

    def run(**batch):
        spec = {"source": source, "prompt": "Say: ${text}", **GREEDY, "output": str(tmp_path / "out"), **batch}
        spec = {name: value for name, value in spec.items() if value is not None}
        report = cluster.run("infer", {"engine": engine, "batch": spec})
        return report, rows(spec["output"])

    return run


def rows(folder):
    return ds.dataset(folder, format="parquet").to_table().sort_by("raylm_row_id").to_pylist()


def _value(text):
    """Return what an answer's text is, or None for one that was cut off."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None


def test_what_a_step_may_ask_equals_offline_vllm(infer, offline, tmp_path):
    """Values of their type, one of a few texts, several answers, and what is kept beside a text; each row once.

    In one task, whose steps ask the same prompt; a typed answer that was cut off ends its row.
    """
    asked = {"prompt": "Say: ${text}", "temperature": 0}
    steps = [
        {**asked, "output_column": "several", "n": 2, "top_k": 1, "temperature": None, "max_tokens": 6},
        {**asked, "output_column": "choice", "choice": CHOICE, "max_tokens": TYPED_TOKENS},
        {**asked, "output_column": "regex", "regex": REGEX, "max_tokens": TYPED_TOKENS},
        {**asked, "output_column": "grammar", "grammar": GRAMMAR, "max_tokens": TYPED_TOKENS},
        {**asked, "output_column": "kept", "keep": KEEP, "extra_body": {"logprobs": 2}, "max_tokens": MAX_TOKENS},
        {**asked, "output_column": "cut", "keep": ["prompt_token_ids"], "max_tokens": 1, **CUT},
        {**asked, "output_column": "typed", "output_schema": SCHEMA, "reasks": 0, "max_tokens": TYPED_TOKENS},
    ]
    unset = dict.fromkeys(("prompt", "temperature", "max_tokens"))
    report, found = infer(steps=steps, max_failed_fraction=1, block_rows=50, **unset)
    expected = [_value(text) for text in offline["schema"]]
    there = [i for i, value in enumerate(expected) if value is not None]

    assert [row["typed"] for row in found] == [expected[i] for i in there]
    assert len(there) > ROWS / 2
    assert len({json.dumps(expected[i]) for i in there}) > 5, "answers must tell rows apart"
    kind = ds.dataset(str(tmp_path / "out"), format="parquet").schema.field("typed").type
    assert [str(one.type) for one in kind] == ["string", "int64", "bool", "list<element: string>"]
    assert report["failures"] == ({"invalid_output": ROWS - len(there)} if len(there) < ROWS else {})
    assert report["cut_off"] >= ROWS - len(there)
    assert [row["choice"] for row in found] == [offline["choice"][i] for i in there]
    assert [row["regex"] for row in found] == [offline["regex"][i] for i in there]
    assert [row["grammar"] for row in found] == [offline["grammar"][i] for i in there]
    assert [row["several"] for row in found] == [offline["several"][i] for i in there]
    assert report["completion_tokens"] > ROWS * (2 * 6 + MAX_TOKENS)
    prompts = [one["prompt_token_ids"] for one in offline["kept"]]
    assert [row["cut_prompt_token_ids"] for row in found] == [prompts[i][-CUT_TOKENS:] for i in there]
    assert report["truncated_prompts"] == sum(len(one) > CUT_TOKENS for one in prompts) > ROWS / 2
    for row, i in zip(found, there, strict=True):
        _check_kept(row, offline["kept"][i])


def _check_kept(row, expected):
    """Compare token ids, and log probabilities of the tokens and of the most likely others."""
    assert row["kept_token_ids"] == expected["token_ids"]
    assert row["kept_prompt_token_ids"] == expected["prompt_token_ids"]
    told = [{str(one["token_id"]): one["logprob"] for one in (at, *at["top"])} for at in row["kept_logprobs"]]
    assert [set(at) for at in told] == [set(at) for at in expected["logprobs"]]
    for at, true in zip(told, expected["logprobs"], strict=True):
        assert at == pytest.approx(true, abs=0.05)


def test_an_answer_that_does_not_fit_is_asked_for_again(infer):
    """One more time, in one row, and paid for: here by all, for what no grammar knows."""
    report, found = infer(output_schema="tests.integration.row_functions:Refused", max_failed_fraction=1, limit=20)

    assert found == []
    assert report["failures"] == {"invalid_output": 20}
    assert report["reasked"] == 20
    assert report["completion_tokens"] >= 40


def test_parameters_per_row_equal_offline_vllm(infer, texts, offline, tmp_path):
    """Rows of a block have their own; a bad one fails that row alone."""
    bad = [{"max_tokens": 0}, {"max_tokens": None}, {"max_tokens": 10_000}, {"top_p": 1.5}]
    own = [own_of(i) for i in range(ROWS)] + [{**own_of(0), **one} for one in bad]
    table = pa.Table.from_pylist(own).append_column("text", pa.array(texts + [f"bad {one}" for one in bad]))
    pq.write_table(table, tmp_path / "in.parquet")
    report, found = infer(source=str(tmp_path / "in.parquet"), **{name: f"${{{name}}}" for name in own_of(0)})

    assert [row["response"] for row in found] == offline["own"]
    assert report["failures"] == {"invalid_parameter": 2, "null_value": 1, "invalid_request": 1}


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_conversations_equal_offline_vllm(infer, texts, offline, tmp_path, block_rows):
    """From a column, after a template."""
    turns = [[{"from": "human", "value": text}] for text in texts]
    pq.write_table(pa.table({"chat": pa.array(turns)}), tmp_path / "in.parquet")
    messages = [{"role": "system", "content": "Be brief."}, "${chat}"]
    _, found = infer(prompt=None, messages=messages, source=str(tmp_path / "in.parquet"), block_rows=block_rows)

    assert [row["response"] for row in found] == offline["chats"]
    assert len(set(offline["chats"])) > ROWS * 0.9, "answers must tell rows apart"


@pytest.mark.parametrize("block_rows", BLOCKS)
def test_tools_equal_offline_vllm(infer, texts, offline, tmp_path, block_rows):
    """One that has to be used: a column of its name and arguments, beside an empty answer."""
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "${text}"}]
    chosen = {"type": "function", "function": {"name": "rate"}}
    told = {"tools": [tool_of(SCHEMA)], "tool_choice": chosen}
    asked = {"messages": messages, "keep": ["tool_calls"], "extra_body": told, "max_tokens": TYPED_TOKENS}
    report, found = infer(prompt=None, source=str(tmp_path / "in.parquet"), block_rows=block_rows, **asked)

    calls = [row["response_tool_calls"] for row in found]
    assert [[(call["name"], call["arguments"]) for call in of_row] for of_row in calls] == [
        [("rate", text)] for text in offline["tools"]
    ]
    assert len(set(offline["tools"])) > 5, "answers must tell rows apart"
    assert (report["failures"], {row["response"] for row in found}) == ({}, {""})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"respone_format": {"type": "text"}}}, "extra_body.respone_format: .*is it response_format"),
        ({"temperature": 1, "seed": 5}, "seed: .*CPUs"),
    ],
)
def test_what_cannot_be_honoured_is_refused_once(infer, tmp_path, fields, words):
    """Before anything is asked, with the field and what to do."""
    with pytest.raises(BatchError, match=words):
        infer(**fields)

    assert not list(Path(tmp_path).rglob("*.parquet"))
