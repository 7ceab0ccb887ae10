"""What is asked in a benchmark: the rows, the question, and the bars that the ratios are held to."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from keyword import kwlist
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILES = 4


@dataclass(frozen=True)
class Workload:
    """One table of prompts, asked by every contender with the same sampling parameters.

    Attributes:
        rows: number of prompts.
        max_tokens: new tokens per row; every row gets exactly as many (``ignore_eos``).
        model: ``tiny`` (two layers) or ``small`` (about 20 million parameters).
        contenders: who takes part; the first is measured against the others.
        bars: by ratio, the least value that counts as met.
        prefixes: instructions of that many tokens each, one of which stands before every prompt.
        repeated: share of the rows whose prompt is another row's.
        batch: fields of the BatchSpec that only this provider knows.
    """

    rows: int
    max_tokens: int
    contenders: tuple[str, ...]
    bars: Mapping[str, float]
    model: str = "tiny"
    prefixes: int = 0
    repeated: float = 0.0
    batch: Mapping[str, Any] = field(default_factory=dict)

    def prompts(self) -> list[str]:
        """Return the prompts: distinct but for ``repeated``, the same in every run."""
        chance = random.Random(7)
        distinct = round(self.rows * (1 - self.repeated))
        instructions = [_instruction(chance) for _ in range(self.prefixes)] or [""]
        texts = [
            f"{chance.choice(instructions)}{i}: " + " ".join(chance.choices(kwlist, k=chance.randint(5, 20)))
            for i in range(distinct)
        ]
        texts += chance.choices(texts, k=self.rows - distinct)
        chance.shuffle(texts)
        return texts

    def write(self, folder: Path, nonce: str) -> Path:
        """Write the prompts as parquet files with the column ``text``; return the folder.

        *nonce* goes before every prompt, so that no contender finds another's prompts in the engine's prefix cache.
        """
        texts = [f"{nonce} {text}" for text in self.prompts()]
        folder.mkdir(parents=True)
        size = -(-len(texts) // FILES)
        for number in range(FILES):
            pq.write_table(pa.table({"text": texts[number * size : (number + 1) * size]}), folder / f"{number}.parquet")
        return folder


def _instruction(chance: random.Random) -> str:
    # About 400 tokens: nearly every word is a token of its own or two to the tiny tokenizer.
    return "Instruction: " + " ".join(chance.choices(kwlist, k=210)) + "\n"


SHORT = Workload(
    rows=10_000,
    max_tokens=16,
    contenders=("ours", "stock", "http", "private", "offline"),
    bars={"ours_vs_stock": 3.0, "ours_vs_offline": 0.9},
)
LONG = Workload(
    rows=1_000,
    max_tokens=128,
    model="small",
    # A block ends when its longest row does; with few rows in all, small ones show the steady state.
    batch={"block_rows": 16},
    contenders=("ours", "stock", "offline"),
    bars={"ours_vs_stock": 1.0, "ours_vs_offline": 0.95},
)
PREFIX = Workload(
    rows=4_000,
    max_tokens=16,
    prefixes=3,
    contenders=("ours", "stock", "offline"),
    bars={"ours_vs_stock": 1.5, "ours_vs_offline": 1.0},
)
DUPLICATES = Workload(
    rows=10_000,
    max_tokens=16,
    repeated=0.3,
    batch={"deduplicate": True},
    contenders=("ours", "offline"),
    bars={"ours_vs_offline": 1.2},
)
WORKLOADS = {"short": SHORT, "long": LONG, "prefix": PREFIX, "duplicates": DUPLICATES}
