"""Encoders, rerankers and adapters on real engines: row by row what vLLM alone answers."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from airflow_provider_raylm.errors import BatchError, EngineError
from tests.clusters import ENGINE_ENVIRON
from tests.conftest import LABELS, REPOSITORY
from tests.integration.conftest import MAX_TOKENS, ROWS
from tests.offline import ENGINE_KWARGS
from tests.offline_kinds import ENCODER_KWARGS
from tests.s3 import BUCKET
from tests.tiny_encoders import LABEL, LENGTH, make_adapter, make_encoder

QUERY = "Which text is like this?"
# Of one engine on CPUs to another: the order in which rows are computed together.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def kinds(cluster, model, texts, tmp_path_factory):
    """Models, adapters, the texts that are short enough for an encoder, and what vLLM alone makes of them."""
    folder = tmp_path_factory.mktemp("kinds")
    labels = {"embed": None, "score": 1}
    models = {task: str(make_encoder(folder / task, number)) for task, number in labels.items()}
    adapters = {
        name: str(make_adapter(folder / name, Path(model), seed)) for seed, name in enumerate(("legal", "friendly"))
    }
    short = [text[: LENGTH - 40] for text in texts]
    prompts = [f"Say: {text}" for text in short]
    task = {**models, "texts": short, "query": QUERY, "model": str(model), "adapters": adapters, "prompts": prompts}
    (folder / "request.json").write_text(json.dumps({**task, "max_tokens": MAX_TOKENS}))
    command = [sys.executable, "-m", "tests.offline_kinds", folder / "request.json", folder / "answers.json"]
    subprocess.run(
        list(map(str, command)), check=True, cwd=REPOSITORY, env={**os.environ, **ENGINE_ENVIRON}, timeout=400
    )
    truth = json.loads((folder / "answers.json").read_text())
    source = folder / "source"
    source.mkdir()
    pq.write_table(pa.table({"text": short, "query": [QUERY] * ROWS}), source / "0.parquet")
    return SimpleNamespace(
        folder=folder,
        model=model,
        models=models,
        adapters=adapters,
        truth=SimpleNamespace(**truth),
        source=str(source),
    )


def _spec(name, model, engine_kwargs=ENCODER_KWARGS, **fields):
    return {"name": name, "model": model, "gpus": 0, "cpus": 0.1, "engine_kwargs": engine_kwargs, **fields}


@pytest.fixture(scope="module")
def deployed(cluster, engine, kinds):
    """An engine of each kind, started side by side: references by name."""
    fsspec.filesystem("s3").put(kinds.adapters["legal"], f"{BUCKET}/legal", recursive=True)
    adapters = {**kinds.adapters, "legal": f"s3://{BUCKET}/legal"}
    # A parser takes chats apart, which is another way through vLLM.
    parsed = {**ENGINE_KWARGS, "reasoning_parser": "qwen3"}
    specs = [_spec(task, model, task=task) for task, model in kinds.models.items()]
    specs.append(_spec("writer", kinds.model, parsed, adapters=adapters, served_name="tiny"))
    jobs = {spec["name"]: _start(cluster, spec) for spec in specs}
    refs = {name: cluster.finish(job, timeout=580)[0] for name, job in jobs.items()}
    yield refs
    for ref in refs.values():
        cluster.run("teardown", {"application": ref["application"]})


def _start(cluster, spec):
    return cluster.start("deploy", {"engine": spec, "labels": {**LABELS, "engine": spec["name"]}, "replace": False})


@pytest.fixture
def infer(cluster, deployed, kinds, tmp_path):
    """Run a task on one of the engines; return its report and the rows of its output in order."""

    def run(engine, **batch):
        spec = {"source": kinds.source, "output": str(tmp_path / "out"), "block_rows": 50, **batch}
        report = cluster.run("infer", {"engine": deployed[engine], "batch": spec})
        return report, ds.dataset(spec["output"], format="parquet").to_table().sort_by("raylm_row_id")

    return run


def test_embeddings_equal_offline_vllm(infer, kinds):
    """As lists of one size, with vLLM's own count of tokens."""
    report, found = infer("embed", embed="${text}")
    vectors = np.array(found["response"].to_pylist(), np.float32)

    assert found.schema.field("response").type == pa.list_(pa.float32(), 64)
    assert np.abs(vectors - np.array(kinds.truth.embed, np.float32)).max() < CLOSE
    assert report["prompt_tokens"] > 2 * ROWS
    assert (report["rows_written"], report["completion_tokens"], report["failures"]) == (ROWS, 0, {})


def test_two_embeddings_have_a_score(infer, kinds):
    """Their cosine."""
    _, found = infer("embed", score=["${query}", "${text}"])

    assert found["response"].to_pylist() == pytest.approx(kinds.truth.cosine, abs=CLOSE)


def test_classes_equal_offline_vllm(infer, kinds):
    """By the names that the model has for them; a reranker knows one."""
    _, found = infer("score", classify="${text}")
    told = [[row["probability"]] for row in found["response"].to_pylist()]

    assert told == [pytest.approx(row, abs=CLOSE) for row in kinds.truth.classify]
    assert {row["label"] for row in found["response"].to_pylist()} == {LABEL}


def test_scores_equal_offline_vllm(infer, kinds):
    """Of a reranker; a text that is too long fails its row alone, unless it is to be cut off."""
    _, found = infer("score", score=["${query}", "${text}"])

    assert found["response"].to_pylist() == pytest.approx(kinds.truth.score, abs=CLOSE)


def test_a_text_beyond_the_model_is_one_rows_fault(infer, tmp_path):
    """Unless the author has it cut off."""
    pq.write_table(pa.table({"text": ["short", "x" * 500]}), tmp_path / "in.parquet")
    asked = {"embed": "${text}", "source": str(tmp_path / "in.parquet")}
    report, found = infer("embed", error_budget=1, **asked)
    cut, whole = infer("embed", output=str(tmp_path / "cut"), extra_body={"truncate_prompt_tokens": -1}, **asked)

    assert (report["failures"], found["text"].to_pylist()) == ({"prompt_too_long": 1}, ["short"])
    assert (cut["failures"], whole.num_rows) == ({}, 2)


def test_adapters_equal_offline_vllm(infer, kinds):
    """Of a task, and mixed in a block by each row's own; from a folder and from S3."""
    names = [name for name, _ in zip(itertools.cycle(kinds.truth.adapters), range(ROWS), strict=False)]
    styled = pq.read_table(kinds.source).append_column("style", pa.array(names))
    pq.write_table(styled, f"{kinds.folder}/styled.parquet")
    source = f"{kinds.folder}/styled.parquet"
    greedy = {"prompt": "Say: ${text}", "temperature": 0, "max_tokens": MAX_TOKENS}
    _, mixed = infer("writer", adapter="${style}", source=source, **greedy)
    answers = kinds.truth.adapters

    assert mixed["response"].to_pylist() == [answers[name][i] for i, name in enumerate(names)]
    differ = sum(one != other for one, other in zip(answers["legal"], answers["friendly"], strict=True))
    assert differ > ROWS / 2, "adapters must tell answers apart"


def test_an_adapter_that_is_not_there(infer, cluster, deployed, kinds, tmp_path):
    """Of a row fails that row; of a task is refused at once; of an engine fails its deployment."""
    pq.write_table(pa.table({"text": ["a", "b"], "style": ["legal", "no such"]}), tmp_path / "in.parquet")
    greedy = {"prompt": "${text}", "max_tokens": 2, "source": str(tmp_path / "in.parquet")}
    report, _ = infer("writer", adapter="${style}", error_budget=1, **greedy)
    assert report["failures"] == {"invalid_request": 1}
    with pytest.raises(BatchError, match="adapter 'no such': the engine has legal, friendly"):
        infer("writer", adapter="no such", output=str(tmp_path / "none"), **greedy)
    spec = _spec("broken", kinds.model, ENGINE_KWARGS, adapters={"gone": f"s3://{BUCKET}/gone"})
    with pytest.raises(EngineError, match=r"adapters.gone: cannot read s3://.*/gone|adapters.gone: .* holds no LoRA"):
        cluster.finish(_start(cluster, spec), timeout=580)


def test_an_engine_with_a_parser_keeps_the_reasoning(infer, kinds):
    """An answer that is nothing but a thought that was cut off has failed; what was thought is a column else."""
    messages = [{"role": "user", "content": "${text}"}]
    asked = {"messages": messages, "max_tokens": 8, "limit": 40, "error_budget": 1}
    report, found = infer("writer", keep=["reasoning", "token_ids"], **asked)

    assert report["rows_written"] + report["failures"].get("answer_cut_off", 0) == 40
    for row in found.to_pylist():
        assert row["response"] or row["response_reasoning"] is not None or row["raylm_finish_reason"] == "stop"
        assert len(row["response_token_ids"]) == row["raylm_completion_tokens"]
