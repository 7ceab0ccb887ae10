"""What is asked in a benchmark: the rows, the question, and the bars that the ratios are held to."""

from __future__ import annotations

import itertools
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
# Bytes of text in a row group, about what Spark writes.
ROW_GROUP = 1 << 26
# Of the model's vocabulary of 1,000: at these, a skewed answer ends.
ENDS = tuple(range(55, 1000, 55))


@dataclass(frozen=True)
class Workload:
    """One table of prompts, asked by every contender with the same sampling parameters.

    Attributes:
        rows: number of prompts.
        max_tokens: new tokens per row; every row gets exactly as many (``ignore_eos``), unless they are skewed.
        model: ``tiny`` (two layers) or ``small`` (about 20 million parameters).
        contenders: who takes part, in this order: who is compared most closely runs next to ours.
        bars: by ratio, the least value that counts as met.
        prefixes: instructions of that many tokens each, one of which stands before every prompt.
        repeated: share of the rows whose prompt is another row's.
        turns: questions per row; each continues with all that was said before.
        floats: numbers in every row that nobody asks for.
        characters: how long prompts are at least.
        skewed: whether answers are sampled and end where the model comes to one of ``ENDS``, some after a token, some
            at ``max_tokens``.
        from_first_request: whether rates run from the first request that the engine gets, and not from the first rows
            that come out: until these do, most of the short answers are there.
        kind: what the prompt is asked for: text, or a vector (``embed``).
        schema: of the answers.
        budgets: whether each row tells its ``max_tokens``.
        adapters: by name; rows take turns.
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
    characters: int = 0
    skewed: bool = False
    from_first_request: bool = False
    kind: str = "prompt"
    schema: Mapping[str, Any] | None = None
    budgets: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)
    batch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that every contender gets."""
        if self.skewed:
            return {"max_tokens": self.max_tokens, "stop_token_ids": list(ENDS), "temperature": 1.0}
        if self.kind == "embed":
            return {}
        # A typed answer ends where its value does.
        ends = {} if self.schema else {"ignore_eos": True}
        return {"max_tokens": self.max_tokens, **ends, "temperature": 0}

    @property
    def question(self) -> dict[str, Any]:
        """The fields of a BatchSpec that ask this."""
        if self.turns == 1:
            sampling = dict(self.sampling)
            further = {name: sampling.pop(name) for name in ("stop_token_ids",) if name in sampling}
            typed = {"output_schema": self.schema, "reasks": 0} if self.schema else {}
            own = {"max_tokens": "${budget}"} if self.budgets else {}
            own |= {"adapter": "${adapter}"} if self.adapters else {}
            return {self.kind: "${text}", **sampling, "extra_body": further, **typed, **own, **self.batch}
        said = ["${text}", *(f"${{turn{number}}}" for number in range(self.turns))]
        steps = [
            {"prompt": "".join(said[: number + 1]), "output_column": f"turn{number}", **self.sampling}
            for number in range(self.turns)
        ]
        return {"steps": steps, **self.batch}

    @property
    def new_tokens(self) -> int | None:
        """How many tokens are generated for all rows, when that is certain."""
        return None if self.skewed else self.rows * self.turns * self.max_tokens

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
        texts = [f"{nonce} {text}".ljust(self.characters, ".") for text in self.prompts()]
        folder.mkdir(parents=True)
        size = -(-len(texts) // FILES)
        for number in range(FILES):
            table = pa.table({"text": texts[number * size : (number + 1) * size]})
            if self.floats:
                every = pa.array(np.tile(np.arange(self.floats, dtype="float32"), table.num_rows))
                column = pa.FixedSizeListArray.from_arrays(every, self.floats)
                table = table.append_column("vector", column)
            if self.budgets:
                table = table.append_column("budget", pa.array([self.max_tokens] * table.num_rows))
            if self.adapters:
                names = itertools.islice(itertools.cycle(self.adapters), table.num_rows)
                table = table.append_column("adapter", pa.array(names))
            # However wide rows are: a reader holds a row group of them.
            group = max(ROW_GROUP // max(self.characters, 1), 1)
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=group)
        return folder


def _instruction(chance: random.Random) -> str:
    # About 400 tokens: nearly every word is a token of its own or two to the tiny tokenizer.
    return "Instruction: " + " ".join(chance.choices(kwlist, k=210)) + "\n"


SHORT = Workload(
    rows=10_000,
    max_tokens=16,
    contenders=("offline", "ours", "offline_fastokens", "stock", "harness", "http", "private"),
    bars={"ours_vs_stock": 3.0, "ours_vs_offline": 0.95, "ours_vs_offline_fastokens": 0.95},
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
    contenders=("offline", "ours", "offline_fastokens", "stock"),
    bars={"ours_vs_stock": 1.5, "ours_vs_offline": 1.0, "ours_vs_offline_fastokens": 0.95},
)
SKEWED = Workload(
    rows=8_000,
    max_tokens=700,
    skewed=True,
    from_first_request=True,
    contenders=("offline", "ours", "offline_in_chunks", "stock"),
    bars={"ours_vs_offline": 0.97, "ours_vs_stock": 1.3, "ours_vs_offline_in_chunks": 1.2},
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
WORKLOADS = {"short": SHORT, "long": LONG, "prefix": PREFIX, "skewed": SKEWED, "duplicates": DUPLICATES, "turns": TURNS}
