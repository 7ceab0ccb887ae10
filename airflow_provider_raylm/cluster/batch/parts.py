"""What is written of a block: a part of its answers, one of its failed rows, and in which order.

A kill may fall between any two writes. Their order makes every such moment tell the truth: a block is done when its
part of answers is there and none of failed rows. So failed rows are written before answers; where a retry adds answers
to a part, they are written before what had failed is taken away.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_provider_raylm.cluster.batch.encoding import encode
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.storage import Place, reading
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import OutputFormat

PART = "part-"


@dataclass(frozen=True)
class Written:
    """What an earlier attempt wrote of a block.

    Attributes:
        name: the block's.
        rows: how many it has in all.
        had_failed: whether the quarantine has a part of it.
        ids: rows that were answered.
        content: the part that they are in; empty without any.
    """

    name: str
    rows: int
    had_failed: bool = False
    ids: frozenset[str] = frozenset()
    content: bytes = field(default=b"", repr=False)


class Change(NamedTuple):
    """A file that gets this content; None deletes it."""

    place: Place
    content: bytes | None

    def make(self) -> None:
        """Write or delete the file.

        Raises:
            BatchError: the storage refused.
        """
        if self.content is None:
            self.place.delete()
        else:
            self.place.write(self.content)


@dataclass(frozen=True)
class Parts:
    """The parts of a folder of answers and of its quarantine.

    Args:
        answers: the folder of answers.
        quarantine: that of failed rows.
        format: of both.
    """

    answers: Place
    quarantine: Place
    format: OutputFormat

    def names(self) -> tuple[list[str], list[str]]:
        """Return the file names of the parts in both folders, as they are now."""
        every = set(self.answers.files())
        if not f"{self.quarantine.path}/".startswith(f"{self.answers.path}/"):
            every |= set(self.quarantine.files())
        folders = [self.answers.path, self.quarantine.path]
        answers, failed = ([p.rpartition("/")[2] for p in every if p.rpartition("/")[0] == path] for path in folders)
        return sorted(n for n in answers if n.startswith(PART)), sorted(n for n in failed if n.startswith(PART))

    def changes(self, block: Written, answered: pa.Table, failed: pa.Table) -> list[Change]:
        """Return what to change, in this order, for what came of a block, beside what an earlier attempt wrote of it.

        Raises:
            BatchError: the rows do not add up.
        """
        if answered.num_rows + failed.num_rows + len(block.ids) != block.rows:
            raise BatchError(f"{answered.num_rows} answered and {failed.num_rows} failed rows of {block}")
        name = f"{PART}{block.name}-{block.rows}.{self.format}"
        changes = []
        if answered.num_rows:
            changes.append(Change(self.answers.below(name), self._joined(block.content, answered)))
        if failed.num_rows:
            # A block of whose rows none is in a part is done only when all of them are.
            at = len(changes) if block.ids else 0
            changes.insert(at, Change(self.quarantine.below(name), encode(failed, self.format)))
        elif block.had_failed:
            changes.append(Change(self.quarantine.below(name), None))
        return changes

    def _joined(self, content: bytes, answered: pa.Table) -> bytes:
        if not content:
            return encode(answered, self.format)
        if self.format == "jsonl":
            return content + encode(answered, self.format)
        before = pq.read_table(io.BytesIO(content))
        return encode(pa.concat_tables([before, answered], promote_options="permissive"), self.format)

    def written(self, name: str, rows: int) -> Written:
        """Return what an earlier attempt wrote of a block of which it answered a part.

        Raises:
            BatchError: its part cannot be read.
        """
        place = self.answers.below(f"{PART}{name}-{rows}.{self.format}")
        with reading(place.uri, self.format):
            content = place.read()
            if self.format == "parquet":
                ids = pq.read_table(io.BytesIO(content), columns=[ROW_ID])[ROW_ID].to_pylist()
            else:
                ids = [json.loads(line)[ROW_ID] for line in content.splitlines()]
        return Written(name, rows, had_failed=True, ids=frozenset(ids), content=content)
