"""What is asked in a benchmark: the rows, the question, and the bars that the ratios are held to."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from keyword import kwlist
from pathlib import Path
from typing import Any

import numpy as np
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
        contenders: who takes part, in this order: who is compared most closely runs next to ours.
        bars: by ratio, the least value that counts as met.
        prefixes: instructions of that many tokens each, one of which stands before every prompt.
        repeated: share of the rows whose prompt is another row's.
        turns: questions per row; each goes on with all that was said before.
        batch: fields of the BatchSpec that only this provider knows.
    """

    rows: int
    max_tokens: int
    contenders: tuple[str, ...]
    bars: Mapping[str, float]
    model: str = "tiny"
    prefixes: int = 0
    repeated: float = 0.0
    turns: int = 1
    floats: int = 0
    batch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that every contender gets."""
        return {"max_tokens": self.max_tokens, "ignore_eos": True, "temperature": 0}

    @property
    def question(self) -> dict[str, Any]:
        """The fields of a BatchSpec that ask this."""
        if self.turns == 1:
            return {"prompt": "${text}", **self.sampling, **self.batch}
        said = ["${text}", *(f"${{turn{number}}}" for number in range(self.turns))]
        steps = [
            {"prompt": "".join(said[: number + 1]), "output_column": f"turn{number}", **self.sampling}
            for number in range(self.turns)
        ]
        return {"steps": steps, **self.batch}

    @property
    def new_tokens(self) -> int:
        """How many tokens are generated for all rows."""
        return self.rows * self.turns * self.max_tokens

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
            table = pa.table({"text": texts[number * size : (number + 1) * size]})
            if self.floats:
                every = pa.array(np.tile(np.arange(self.floats, dtype="float32"), table.num_rows))
                column = pa.FixedSizeListArray.from_arrays(every, self.floats)
                table = table.append_column("vector", column)
            pq.write_table(table, folder / f"{number}.parquet")
        return folder


def _instruction(chance: random.Random) -> str:
    # About 400 tokens: nearly every word is a token of its own or two to the tiny tokenizer.
    return "Instruction: " + " ".join(chance.choices(kwlist, k=210)) + "\n"


SHORT = Workload(
    rows=10_000,
    max_tokens=16,
    contenders=("offline", "ours", "stock", "http", "private"),
    bars={"ours_vs_stock": 3.0, "ours_vs_offline": 0.95},
)
LONG = Workload(
    rows=1_000,
    max_tokens=128,
    model="small",
    # With so few rows, small blocks: the rate is taken from the first that comes out.
    batch={"block_rows": 16},
    contenders=("offline", "ours", "stock"),
    bars={"ours_vs_stock": 1.0, "ours_vs_offline": 0.95},
)
PREFIX = Workload(
    rows=12_000,
    max_tokens=16,
    prefixes=3,
    contenders=("offline", "ours", "stock"),
    bars={"ours_vs_stock": 1.5, "ours_vs_offline": 1.0},
)
DUPLICATES = Workload(
    rows=10_000,
    max_tokens=16,
    repeated=0.3,
    batch={"deduplicate": True},
    contenders=("offline", "ours"),
    bars={"ours_vs_offline": 1.2},
)
# The case of ray-project/ray#55179. Every turn of "private" has an engine, so rates are per engine.
TURNS = Workload(
    rows=12_000,
    max_tokens=16,
    turns=2,
    contenders=("ours", "private"),
    bars={"ours_vs_private_per_engine": 1.8},
)
WORKLOADS = {"short": SHORT, "long": LONG, "prefix": PREFIX, "duplicates": DUPLICATES, "turns": TURNS}
