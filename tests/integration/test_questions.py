"""All that a row may be asked, on the real engine: row by row what vLLM alone answers."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from airflow_provider_raylm.errors import BatchError
from tests.integration.conftest import CHATS, CHOICE, MAX_TOKENS, ROWS, SCHEMA
from tests.offline import TYPED_TOKENS, budget_of

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


def test_typed_answers_equal_offline_vllm(infer, offline, tmp_path):
    """As values of their type; what was cut off is in the quarantine, each row once."""
    report, found = infer(output_schema=SCHEMA, max_tokens=TYPED_TOKENS, reasks=0, error_budget=1, block_rows=50)
    expected = [_value(text) for text in offline["schema"]]
    valid = [value for value in expected if value is not None]

    assert [row["response"] for row in found] == valid
    assert len(valid) > ROWS / 2
    assert len({json.dumps(value) for value in valid}) > 5, "answers must tell rows apart"
    kind = ds.dataset(str(tmp_path / "out"), format="parquet").schema.field("response").type
    assert [str(one.type) for one in kind] == ["string", "int64", "bool", "list<element: string>"]
    assert report["failures"] == ({"invalid_output": ROWS - len(valid)} if len(valid) < ROWS else {})
    assert report["cut_off"] >= ROWS - len(valid)


def test_a_choice_equals_offline_vllm(infer, offline):
    """Every answer is one of those that the author names."""
    report, found = infer(choice=CHOICE, max_tokens=TYPED_TOKENS)

    assert [row["response"] for row in found] == offline["choice"]
    assert report["reasked"] == 0


def test_an_answer_that_does_not_fit_is_asked_for_again(infer):
    """One more time, in one row, and paid for: here by all, for what no grammar knows."""
    report, found = infer(output_schema="tests.integration.row_functions:Refused", error_budget=1, limit=20)

    assert found == []
    assert report["failures"] == {"invalid_output": 20}
    assert report["reasked"] == 20
    assert report["completion_tokens"] >= 40


def test_budgets_per_row_equal_offline_vllm(infer, texts, offline, tmp_path):
    """Rows of a block have their own; a bad one fails that row alone."""
    budgets = pa.array([budget_of(i) for i in range(ROWS)] + [0, None, 10_000], pa.int64())
    table = pa.table({"text": [*texts, "zero", "null", "beyond the context"], "budget": budgets})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    report, found = infer(source=str(tmp_path / "in"), max_tokens="${budget}")

    assert [row["response"] for row in found] == offline["budgets"]
    assert report["failures"] == {"invalid_parameter": 1, "null_value": 1, "invalid_request": 1}


def test_several_answers_equal_offline_vllm(infer, offline, tmp_path):
    """As a list, with the tokens of all."""
    report, found = infer(n=2, top_k=1, temperature=None, max_tokens=6)
    _, sampled = infer(n=3, temperature=1.5, max_tokens=6, limit=20, output=str(tmp_path / "sampled"))

    assert [row["response"] for row in found] == offline["several"]
    assert report["completion_tokens"] == sum(row["raylm_completion_tokens"] for row in found) > ROWS * 6
    assert [len(row["response"]) for row in sampled] == [3] * 20
    assert any(len(set(row["response"])) == 3 for row in sampled)


def test_what_is_kept_equals_offline_vllm(infer, offline):
    """Token ids of prompt and answer, and log probabilities of the tokens and the most likely others."""
    keep = ["token_ids", "prompt_token_ids", "logprobs"]
    _, found = infer(keep=keep, extra_body={"logprobs": 2})

    for row, expected in zip(found, offline["kept"], strict=True):
        assert row["response_token_ids"] == expected["token_ids"]
        assert row["response_prompt_token_ids"] == expected["prompt_token_ids"]
        told = [{str(one["token_id"]): one["logprob"] for one in (at, *at["top"])} for at in row["response_logprobs"]]
        assert [set(at) for at in told] == [set(at) for at in expected["logprobs"]]
        for at, true in zip(told, expected["logprobs"], strict=True):
            assert at == pytest.approx(true, abs=0.05)


def test_conversations_equal_offline_vllm(infer, texts, offline, tmp_path):
    """From a column, of JSON text, and of structs after a template."""
    chats = [[{"from": "system", "value": "Be brief."}, {"from": "human", "value": text}] for text in texts[:CHATS]]
    forms = [
        (pa.array([json.dumps(chat) for chat in chats]), "${chat}"),
        (pa.array([chat[1:] for chat in chats]), [{"role": "system", "content": "Be brief."}, "${chat}"]),
    ]
    for number, (column, messages) in enumerate(forms):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(pa.table({"chat": column}), folder / "0.parquet")
        _, found = infer(prompt=None, messages=messages, source=str(folder), output=str(folder / "_out"))

        assert [row["response"] for row in found] == offline["chats"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra_body": {"respone_format": {"type": "text"}}}, "extra_body.respone_format: .*is it response_format"),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "x"}], "keep": ["reasoning"]},
            "keep='reasoning': the engine has no parser for it; .*reasoning_parser",
        ),
        ({"temperature": 1, "seed": 5}, "seed: .*CPUs"),
        ({"output_schema": "no.such:Model"}, "output_schema: cannot import no.such:Model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_once(infer, tmp_path, fields, words):
    """Before anything is asked, with the field and what to do."""
    with pytest.raises(BatchError, match=words):
        infer(**fields)

    assert not list(Path(tmp_path).rglob("*.parquet"))
