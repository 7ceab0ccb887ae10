"""Questions to the engine that all tests share, and what vLLM alone answers to them."""

import json
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.clusters import ENGINE_ENVIRON
from tests.conftest import REPOSITORY

MAX_TOKENS = 12
ROWS = 320
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", "so so"]},
        "stars": {"enum": [1, 2, 3]},
        "sure": {"type": ["boolean", "null"]},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["mood", "stars", "sure", "words"],
    "additionalProperties": False,
}
CHOICE = ["one", "two or three", "many"]
REGEX = r"[a-d]{2,6}-\d{1,3}"
GRAMMAR = 'root ::= word " and " word\nword ::= "black" | "white" | [0-9]+'


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
    """vLLM's own answers to all texts, as completions and as chats."""
    request, answers = cluster.folder / "offline.json", cluster.folder / "offline-answers.json"
    task = {
        "model": model,
        "prompts": [f"Say: {text}" for text in texts],
        "chats": [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in texts],
        "max_tokens": MAX_TOKENS,
        "schema": SCHEMA,
        "choice": CHOICE,
        "regex": REGEX,
        "grammar": GRAMMAR,
    }
    request.write_text(json.dumps(task))
    command = [sys.executable, "-m", "tests.offline", str(request), str(answers)]
    subprocess.run(
        command, check=True, cwd=REPOSITORY, env={**os.environ, **ENGINE_ENVIRON}, timeout=400, capture_output=True
    )
    return json.loads(answers.read_text())


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
