"""Encoders, rerankers, adapters and images on real engines: row by row what vLLM alone answers."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.clusters import ENGINE_ENVIRON
from tests.conftest import LABELS, REPOSITORY
from tests.integration.conftest import MAX_TOKENS, ROWS
from tests.offline import ENGINE_KWARGS
from tests.offline_kinds import CUT, ENCODER_KWARGS, THINKING, THOUGHT_TOKENS
from tests.s3 import BUCKET
from tests.tiny_encoders import LABEL, LENGTH, make_adapter, make_encoder
from tests.tiny_model import make_tiny_model
from tests.tiny_vision import make_image, make_tiny_vision_model

QUERY = "Which text is like this?"
IMAGES = 20
# Many at a time, and all in one.
BLOCKS = [7, ROWS]
# Of one engine on CPUs to another: the order in which rows are computed together.
CLOSE = 1e-4
# What is lost between float32 and float16, of the largest number.
HALF = 1e-3


@pytest.fixture(scope="module")
def kinds(cluster, texts, tmp_path_factory):
    """Models, adapters, the texts that are short enough for an encoder, and what vLLM alone makes of them."""
    folder = tmp_path_factory.mktemp("kinds")
    model = make_tiny_model(folder / "writer", further=THINKING)
    labels = {"embed": None, "score": 1}
    models = {task: str(make_encoder(folder / task, number)) for task, number in labels.items()}
    adapters = {name: str(make_adapter(folder / name, model, seed)) for seed, name in enumerate(("legal", "friendly"))}
    short = [text[: LENGTH - 40] for text in texts]
    prompts = [f"Say: {text}" for text in short]
    models["vision"] = str(make_tiny_vision_model(folder / "vision"))
    task = {**models, "texts": short, "query": QUERY, "model": str(model), "adapters": adapters, "prompts": prompts}
    task["images"] = IMAGES
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
        model=str(model),
        models=models,
        adapters=adapters,
        truth=SimpleNamespace(**truth),
        source=str(source),
    )


def _spec(name, model, engine_kwargs=ENCODER_KWARGS, **fields):
    fields = {"gpus_per_worker": 0, "num_cpus": 0.1, **fields}
    return {"name": name, "model": model, "engine_kwargs": engine_kwargs, **fields}


# Two at a time: each takes up to two gigabytes.
POOLING, GENERATING = (
    pytest.mark.parametrize("deployed", [names], ids="+".join, indirect=True)
    for names in (("embed", "score"), ("seer", "writer"))
)


@pytest.fixture(scope="module")
def deployed(request, cluster, engine, kinds):
    """Some engines, started side by side: references by name."""
    fsspec.filesystem("s3").put(kinds.adapters["legal"], f"{BUCKET}/legal", recursive=True)
    adapters = {**kinds.adapters, "legal": f"s3://{BUCKET}/legal"}
    # A parser takes chats apart, which is another way through vLLM.
    parsed = {**ENGINE_KWARGS, "reasoning_parser": "qwen3"}
    specs = [_spec(task, kinds.models[task], task=task) for task in ("embed", "score")]
    allowed = [f"s3://{BUCKET}/photos", str(kinds.folder / "photos")]
    specs.append(_spec("seer", kinds.models["vision"], ENGINE_KWARGS, media={"allowed": allowed}))
    specs.append(_spec("writer", kinds.model, parsed, adapters=adapters, served_model_name="tiny"))
    jobs = {spec["name"]: _start(cluster, spec) for spec in specs if spec["name"] in request.param}
    refs = {name: cluster.finish(job, timeout=580)[0] for name, job in jobs.items()}
    yield refs
    for job in [cluster.start("teardown", {"application": ref["application"]}) for ref in refs.values()]:
        cluster.finish(job)


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


@POOLING
@pytest.mark.parametrize("block_rows", BLOCKS)
def test_embeddings_and_their_cosine_equal_offline_vllm(infer, kinds, block_rows):
    """As lists of one size, with vLLM's own count of tokens; two texts have the cosine of their embeddings.

    A text that is cut has the embedding of what is left, and is counted.
    """
    steps = [
        {"embed": "${text}", "output_column": "vector"},
        {"score": ["${query}", "${text}"], "output_column": "cosine"},
        {"embed": "${text}", "output_column": "cut", **CUT},
        {"embed": "${text}", "output_column": "raw", "normalize": False, "vector_type": "float16"},
    ]
    report, found = infer("embed", steps=steps, block_rows=block_rows)
    vectors = np.array(found["vector"].to_pylist(), np.float32)

    assert found.schema.field("vector").type == pa.list_(pa.float32(), 64)
    assert np.abs(vectors - np.array(kinds.truth.embed, np.float32)).max() < CLOSE
    assert found["cosine"].to_pylist() == pytest.approx(kinds.truth.cosine, abs=CLOSE)
    assert np.abs(np.array(found["cut"].to_pylist()) - np.array(kinds.truth.cut)).max() < CLOSE
    raw = np.array(found["raw"].to_pylist(), np.float32)
    assert np.abs(raw - np.array(kinds.truth.raw, np.float32)).max() < HALF * np.abs(raw).max()
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1, "normalised all the same"
    assert report["truncated_prompts"] == sum(kinds.truth.longer) > ROWS / 2
    assert report["prompt_tokens"] > 2 * ROWS
    assert (report["rows_written"], report["completion_tokens"], report["failures"]) == (ROWS, 0, {})


@POOLING
@pytest.mark.parametrize("block_rows", BLOCKS)
def test_scores_and_classes_equal_offline_vllm(infer, kinds, block_rows):
    """Of a reranker, which knows one class, by the name that the model has for it."""
    steps = [
        {"score": ["${query}", "${text}"], "output_column": "fits"},
        {"classify": "${text}", "output_column": "classes", "probabilities": True},
    ]
    report, found = infer("score", steps=steps, block_rows=block_rows)

    assert found["fits"].to_pylist() == pytest.approx(kinds.truth.score, abs=CLOSE)
    classes = found["classes"].to_pylist()
    assert [[one["probability"] for one in row] for row in classes] == [
        pytest.approx(row, abs=CLOSE) for row in kinds.truth.classify
    ]
    assert {one["label"] for row in classes for one in row} == {LABEL}
    assert (report["rows_written"], report["completion_tokens"], report["failures"]) == (ROWS, 0, {})


@POOLING
def test_a_text_beyond_the_model_is_one_rows_fault(infer, tmp_path):
    """The others of its block, which are rendered together with it, are answered."""
    pq.write_table(pa.table({"text": ["short", "x" * 500]}), tmp_path / "in.parquet")
    report, found = infer("embed", max_failed_fraction=1, embed="${text}", source=str(tmp_path / "in.parquet"))

    assert (report["failures"], found["text"].to_pylist()) == ({"prompt_too_long": 1}, ["short"])


@GENERATING
def test_adapters_equal_offline_vllm(infer, kinds, tmp_path):
    """Mixed in a block by each row's own, from a folder and from S3; a row that names no adapter fails."""
    names = [name for name, _ in zip(itertools.cycle(kinds.truth.adapters), range(ROWS), strict=False)]
    rows = pq.read_table(kinds.source).append_column("style", pa.array(names))
    other = rows.slice(0, 1).set_column(2, "style", pa.array(["no such"]))
    pq.write_table(pa.concat_tables([rows, other]), tmp_path / "styled.parquet")
    greedy = {"prompt": "Say: ${text}", "temperature": 0, "max_tokens": MAX_TOKENS}
    report, mixed = infer("writer", adapter="${style}", source=str(tmp_path / "styled.parquet"), **greedy)
    answers = kinds.truth.adapters

    assert mixed["response"].to_pylist() == [answers[name][i] for i, name in enumerate(names)]
    assert report["failures"] == {"invalid_request": 1}
    differ = sum(one != other for one, other in zip(answers["legal"], answers["friendly"], strict=True))
    assert differ > ROWS / 2, "adapters must tell answers apart"


@GENERATING
def test_images_equal_offline_vllm(infer, kinds, tmp_path):
    """That rows hold, and that they name, on S3 and in a folder; a row whose image is none, or not allowed, fails."""
    pictures = [make_image(seed) for seed in range(IMAGES)]
    folders = [f"s3://{BUCKET}/photos", str(kinds.folder / "photos")]
    for number, picture in enumerate(pictures):
        with fsspec.open(f"{folders[number % 2]}/{number}.png", "wb", auto_mkdir=number % 2 == 1) as file:
            file.write(picture)
    seen = [i % IMAGES for i in range(ROWS)]
    rows = pq.read_table(kinds.source).append_column("photo", pa.array([pictures[i] for i in seen]))
    rows = rows.append_column("address", pa.array([f"{folders[i % 2]}/{i}.png" for i in seen]))
    bad = rows.slice(0, 2).set_column(2, "photo", pa.array([b"no image", pictures[0]]))
    bad = bad.set_column(3, "address", pa.array([f"{folders[0]}/0.png", "s3://elsewhere/0.png"]))
    pq.write_table(pa.concat_tables([rows, bad]), tmp_path / "in.parquet")
    steps = [
        {"messages": _seen("${photo}"), "output_column": "held", "temperature": 0, "max_tokens": MAX_TOKENS},
        {"messages": _seen("${address}"), "output_column": "named", "temperature": 0, "max_tokens": MAX_TOKENS},
    ]
    report, found = infer("seer", steps=steps, source=str(tmp_path / "in.parquet"))

    assert found["held"].to_pylist() == found["named"].to_pylist() == kinds.truth.seen
    assert len(set(kinds.truth.seen)) > ROWS / 2
    assert report["failures"] == {"invalid_request": 1, "invalid_image": 1}


def _seen(image):
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": "${text}"}, {"type": "image_url", "image_url": {"url": image}}],
        }
    ]


@GENERATING
def test_reasoning_equals_offline_vllm(infer, kinds):
    """As vLLM's parser takes it apart; an answer that is nothing but a thought that was cut off has failed."""
    asked = {"messages": [{"role": "user", "content": "${text}"}], "max_tokens": THOUGHT_TOKENS, "temperature": 0}
    report, found = infer(
        "writer",
        keep=["reasoning", "token_ids"],
        extra_body={"logit_bias": kinds.truth.bias},
        max_failed_fraction=1,
        **asked,
    )
    cut = [one for one in kinds.truth.thoughts if one["finish_reason"] == "length" and not one["said"]]
    whole = [one for one in kinds.truth.thoughts if one not in cut]

    columns = {
        "response": "said",
        "response_reasoning": "reasoning",
        "response_token_ids": "token_ids",
        "raylm_finish_reason": "finish_reason",
    }
    assert found.select(list(columns)).to_pylist() == [
        {column: one[name] for column, name in columns.items()} for one in whole
    ]
    assert report["failures"] == {"answer_cut_off": len(cut)}
    assert len({(one["reasoning"], one["said"]) for one in whole}) > ROWS / 4, "answers must tell rows apart"
