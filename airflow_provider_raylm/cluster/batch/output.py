"""Where answers go: one part for each block, a quarantine beside it, and a manifest that says how far it is.

A file appears whole or not at all, so a kill falls between two writes; the manifest says what is being done before it
is.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_provider_raylm.cluster.batch.encoding import encode, writable
from airflow_provider_raylm.cluster.batch.parts import PART, Parts
from airflow_provider_raylm.cluster.batch.storage import REQUESTS_AT_A_TIME, Place, reading
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchReport, BatchSpec

MANIFEST = "_manifest.json"
_PART = re.compile(r"part-(\d{5,}-\d{9,})-(\d+)\.(?:parquet|jsonl)")
# The name of a part without rows: it only has the columns.
_EMPTY = f"{PART}{0:05d}-{0:09d}-0"

State = Literal["clearing", "writing", "complete"]


@dataclass(frozen=True)
class Progress:
    """How far an output is when a task begins on it.

    Attributes:
        block_rows: what its blocks were cut at.
        done: names of the blocks of which every row is answered, with their rows.
        failed: names of those with rows in the quarantine, which get another chance.
        partly: names of those of them that have answers, too.
    """

    block_rows: int
    done: Mapping[str, int] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()
    partly: frozenset[str] = frozenset()


class Output:
    """The output of one task, as its driver sees it: begun before the first row, finished after the last."""

    def __init__(self, spec: BatchSpec, mark: str) -> None:
        self._spec = spec
        self._mark = mark
        self._manifest = Place(f"{spec.output}/{MANIFEST}")
        self.parts = Parts(Place(spec.output), Place(spec.quarantine_uri), spec.output_format)

    def begin(self, schema: pa.Schema) -> Progress | BatchReport:
        """Make the folder ready; return how far it is, or the report of a run that finished this very task.

        Args:
            schema: columns of an answered row.

        Raises:
            BatchError: the folder holds something else, and ``overwrite`` is off; or a column cannot be written.
        """
        if (problem := writable(schema, self._spec.output_format)) is not None:
            raise BatchError(f"{problem} Leave the column out (columns=), or set output_format to jsonl.")
        manifest = self._read_manifest()
        if manifest is not None and manifest.get("fingerprint") == self._mark:
            if manifest["state"] == "complete":
                return BatchReport.model_validate(manifest["report"])
            if manifest["state"] == "writing":
                return self.progress(manifest["block_rows"])
            return self._cleared()
        answers, failed = self.parts.names()
        if manifest is None and not answers and not failed:
            self._write_manifest("writing")
            return Progress(self._spec.block_rows)
        if not self._spec.overwrite:
            holds = (answers or failed)[0] if manifest is None else _holds(manifest)
            raise BatchError(
                f"{self._spec.output} (or its quarantine) holds {holds}, this task is {self._mark}. Choose another "
                "output, delete it, or set overwrite=True."
            )
        return self._cleared()

    def progress(self, block_rows: int) -> Progress:
        """Return how far the folder is, by one listing; its blocks were cut at *block_rows*."""
        answers, failed = (dict(map(_block, names)) for names in self.parts.names())
        return Progress(
            block_rows,
            done={name: rows for name, rows in answers.items() if rows and name not in failed},
            failed=frozenset(failed),
            partly=frozenset(name for name, rows in answers.items() if rows and name in failed),
        )

    def _cleared(self) -> Progress:
        """Delete all parts; until the last one is gone, the manifest says that they are being deleted."""
        self._write_manifest("clearing")
        answers, failed = self.parts.names()
        gone = [self.parts.answers.below(name) for name in answers]
        gone += [self.parts.quarantine.below(name) for name in failed]
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME, thread_name_prefix="raylm-clear") as pool:
            list(pool.map(Place.delete, gone))
        self._write_manifest("writing")
        return Progress(self._spec.block_rows)

    def finish(self, report: BatchReport, blocks: Mapping[str, int], failed: set[str], schema: pa.Schema) -> None:
        """Check that the parts of all blocks are there, and no others, and write the manifest.

        Args:
            report: what the task counted.
            blocks: names of all blocks, with their rows.
            failed: names of those with failed rows.
            schema: columns of an answered row, for an output without any.

        Raises:
            BatchError: a part is missing, or there twice, or of somebody else.
        """
        names = self.parts.names()
        answers, quarantined = ([_block(name) for name in found] for found in names)
        answers = [block for block in answers if block[1]]
        there = {*answers, *quarantined}
        doubled = len({name for name, _ in there}) != len(there)
        if doubled or there != set(blocks.items()) or {name for name, _ in quarantined} != failed:
            strange = sorted(there ^ set(blocks.items()))[:1] or sorted(failed ^ {name for name, _ in quarantined})[:1]
            raise BatchError(
                f"the parts in {self._spec.output} and its quarantine are not those of the {len(blocks)} blocks that "
                f"were answered ({strange[0]} for one). Something else wrote or deleted there: choose another output."
            )
        empty = self.parts.answers.below(f"{_EMPTY}.{self._spec.output_format}")
        if not answers:
            empty.write(encode(schema.empty_table(), self._spec.output_format))
        elif empty.path.rpartition("/")[2] in names[0]:
            empty.delete()
        if self._spec.output_format == "parquet" and (self._spec.preprocess or self._spec.postprocess):
            self._unify([self.parts.answers.below(name) for name in names[0] if _block(name)[1]])
        self._write_manifest("complete", report)

    def _unify(self, parts: list[Place]) -> None:
        """Give all parts the one schema that holds what row functions made of each; text where no other does."""
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME, thread_name_prefix="raylm-unify") as pool:
            schemas = list(pool.map(lambda part: pq.read_schema(io.BytesIO(part.read())), parts))
            one = _one_schema(schemas)
            different = [part for part, schema in zip(parts, schemas, strict=True) if not schema.equals(one)]
            list(pool.map(lambda part: part.write(_recast(part, one)), different))

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            with reading(self._manifest.uri, "a manifest"):
                manifest: dict[str, Any] = json.loads(self._manifest.read())
        except BatchError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        # Of a version that knew no states, and whose fingerprints are others.
        return {"state": "writing", **manifest}

    def _write_manifest(self, state: State, report: BatchReport | None = None) -> None:
        manifest = {
            "state": state,
            "fingerprint": self._mark,
            "block_rows": self._spec.block_rows,
            "spec": self._spec.model_dump(mode="json", exclude_defaults=True),
            "report": report.model_dump(mode="json") if report else None,
        }
        self._manifest.write(json.dumps(manifest, indent=1).encode())


def _holds(manifest: Mapping[str, Any]) -> str:
    what = {"clearing": "what an overwrite had begun to delete,", "writing": "the unfinished output"}
    return f"{what.get(manifest['state'], 'the output')} of another spec, engine or input ({manifest['fingerprint']})"


def _block(name: str) -> tuple[str, int]:
    """Return the name and the rows of the block that a part file belongs to; of a foreign file its own name."""
    match = _PART.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, -1)


def _one_schema(schemas: list[pa.Schema]) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    for one in chain.from_iterable(schemas):
        before = fields.get(one.name, one)
        try:
            pair = [pa.schema([before]), pa.schema([one])]
            fields[one.name] = pa.unify_schemas(pair, promote_options="permissive").field(0)
        except pa.ArrowException:
            fields[one.name] = one.with_type(pa.string())
    return pa.schema(fields.values())


def _recast(part: Place, schema: pa.Schema) -> bytes:
    from airflow_provider_raylm.cluster.batch.json_text import as_text

    table = pq.read_table(io.BytesIO(part.read()))
    columns = []
    for one in schema:
        if one.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, one.type))
            continue
        column = table[one.name]
        if pa.types.is_string(one.type) and not pa.types.is_string(column.type):
            column = pa.array(map(as_text, column.to_pylist()), pa.string())
        columns.append(column.cast(one.type))
    return encode(pa.Table.from_arrays(columns, schema=schema), "parquet")
