"""One real engine for the whole run, and what vLLM alone answers to the same questions."""

import json
import os
import random
import secrets
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.clusters import ENGINE_ENVIRON
from tests.conftest import REPOSITORY
from tests.offline import ENGINE_KWARGS
from tests.tiny_model import make_tiny_model

LABELS = {"installation": "tests", "dag_id": "d", "run_id": "manual__2026-01-01T00:00:00+00:00", "engine": "shared"}
MAX_TOKENS = 12
ROWS = 320
CHATS = 40
# The first is nobody's; libraries treat the others specially.
SECRET_NAMES = (
    "RAYLM_TEST_SECRET",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "GOOGLE_API_KEY",
    "RAY_TEST_SECRET",
    "VLLM_API_KEY",
)


@pytest.fixture(scope="session")
def model(cluster):
    """A small model with random weights."""
    return str(make_tiny_model(cluster.folder / "model"))


@pytest.fixture(scope="session")
def texts():
    """Distinct texts of many lengths and scripts."""
    chance = random.Random(7)
    words = [
        "alpha",
        "beta",
        "gamma",
        "größe",
        "東京",
        "🙂",
        "x=1;",
        '"quoted"',
        "'single'",
        "\\back",
        "${not}",
        "{{no}}",
        "\t",
        "tab",
    ]
    return [f"{i}: " + " ".join(chance.choices(words, k=chance.randint(1, 40))) for i in range(ROWS)]


@pytest.fixture(scope="session")
def offline(cluster, model, texts):
    """vLLM's own answers: completions for all texts, chats for the first ones."""
    request, answers = cluster.folder / "offline.json", cluster.folder / "offline-answers.json"
    task = {
        "model": model,
        "prompts": [f"Say: {text}" for text in texts],
        "chats": [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in texts[:CHATS]
        ],
        "max_tokens": MAX_TOKENS,
    }
    request.write_text(json.dumps(task))
    command = [sys.executable, "-m", "tests.offline", str(request), str(answers)]
    subprocess.run(
        command, check=True, cwd=REPOSITORY, env={**os.environ, **ENGINE_ENVIRON}, timeout=400, capture_output=True
    )
    return json.loads(answers.read_text())


@pytest.fixture(scope="session")
def secret(cluster):
    """A file with a secret."""
    path = cluster.folder / "secret"
    path.write_text(f"{secrets.token_hex(16)}\n")
    return path


@pytest.fixture(scope="session")
def engine_spec(model, secret):
    """The shared engine's spec."""
    # Half a CPU on paper, so that a second engine and the pipelines fit beside it on two cores.
    return {
        "name": "shared",
        "model": model,
        "served_name": "tiny",
        "gpus": 0,
        "cpus": 0.5,
        "engine_kwargs": ENGINE_KWARGS,
        "secret_env": dict.fromkeys(SECRET_NAMES, str(secret)),
    }


@pytest.fixture(scope="session")
def engine(cluster, engine_spec, offline):
    """The engine that all tests share, by reference. Offline first: two engines at once would starve each other."""
    ref, said = cluster.finish(
        cluster.start("deploy", {"engine": engine_spec, "labels": LABELS, "replace": False}), timeout=580
    )
    assert ref["adopted"] is False
    assert any("is up after" in line for line in said)
    return ref


@pytest.fixture(scope="session")
def source(cluster, texts):
    """The texts in three parquet files."""
    folder = cluster.folder / "texts"
    folder.mkdir()
    third = ROWS // 3 + 1
    for number in range(3):
        part = texts[number * third : (number + 1) * third]
        keys = [f"key-{texts.index(text)}" for text in part]
        pq.write_table(pa.table({"text": part, "key": keys}), folder / f"{number}.parquet")
    return str(folder)
