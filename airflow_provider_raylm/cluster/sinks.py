"""Where answers go: one file per block, a quarantine beside it, and a manifest that says when all is there.

A file appears whole or not at all. The manifest is written before the first row is asked, with the task's fingerprint,
and again at the end with the report; so a later attempt knows which rows are there and that they answer the same
question about the same input.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from pandas.util import hash_array

from airflow_provider_raylm.cluster.source import ROW_ID, SourceFile
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.naming import fingerprint
from airflow_provider_raylm.specs import BatchReport, BatchSpec, OutputFormat

MANIFEST = "_manifest.json"
PART = "part-"


def task_fingerprint(spec: BatchSpec, engine: str, files: list[SourceFile]) -> str:
    """Return 12 hex digits of what is asked, of which engine (its fingerprint), and about which exact input."""
    content = [fingerprint(spec), engine, sorted((file.uri, file.version) for file in files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def checksum(ids: Iterable[pa.Array]) -> int:
    """Return a sum over ids, the same in any order: two lists of ids have the same one only if they are equal.

    The sum of 64-bit hashes, modulo 2**64, takes no memory that grows with the rows; a set of a million ids does.
    """
    total = sum(int(hash_array(chunk.to_numpy(zero_copy_only=False), categorize=False).sum()) for chunk in ids)
    return total % 2**64


@dataclass(frozen=True)
class Folder:
    """A folder of part files in one format, on any storage that fsspec opens."""

    uri: str
    format: OutputFormat

    def parts(self) -> list[str]:
        """Return the paths of the part files, sorted."""
        fs, root = url_to_fs(self.uri)
        if not fs.exists(root):
            return []
        names = fs.ls(root, detail=False)
        return sorted(name for name in names if name.rpartition("/")[2].startswith(PART))

    def write(self, table: pa.Table) -> None:
        """Write *table* as one part file, named after the ids in it: the same rows never become two files."""
        digest = hashlib.sha256(json.dumps(table[ROW_ID].to_pylist()).encode()).hexdigest()[:20]
        self.write_bytes(f"{PART}{digest}.{self.format}", _encode(table, self.format))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file so that a reader sees all of it or nothing.

        Raises:
            BatchError: the storage refused; the text names the place.
        """
        try:
            fs, root = url_to_fs(self.uri)
            fs.makedirs(root, exist_ok=True)
            # A local file is renamed into place; an object store shows an object only when its upload is complete.
            local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
            target = f"{root}/.{name}.tmp" if local else f"{root}/{name}"
            with fs.open(target, "wb") as stream:
                stream.write(content)
            if local:
                fs.mv(target, f"{root}/{name}")
        except OSError as error:
            raise BatchError(f"cannot write {self.uri}/{name}: {error}") from error

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None when there is none."""
        fs, root = url_to_fs(self.uri)
        if not fs.exists(f"{root}/{MANIFEST}"):
            return None
        manifest: dict[str, Any] = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
        return manifest

    def row_ids(self) -> pa.Array:
        """Return the ids of all rows in the folder."""
        return pa.chunked_array(list(self.id_chunks()), pa.string()).combine_chunks()

    def id_chunks(self) -> Iterator[pa.Array]:
        """Yield the ids of all rows in the folder, file by file."""
        fs, _ = url_to_fs(self.uri)
        for path in self.parts():
            with fs.open(path, "rb") as stream:
                if self.format == "parquet":
                    yield from pq.read_table(stream, columns=[ROW_ID])[ROW_ID].chunks
                else:
                    yield pa.array([json.loads(line)[ROW_ID] for line in stream], pa.string())

    def clear(self) -> None:
        """Delete the part files, and nothing else."""
        fs, _ = url_to_fs(self.uri)
        for path in self.parts():
            fs.rm_file(path)


def _encode(table: pa.Table, format: OutputFormat) -> bytes:
    if format == "parquet":
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        return bytes(buffer.getvalue())
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist()).encode()


class Output:
    """The output of one task: prepared before the first row, finished after the last."""

    def __init__(self, spec: BatchSpec, mark: str) -> None:
        self._spec = spec
        self._mark = mark
        self.answers = Folder(spec.output.rstrip("/"), spec.output_format)
        self.quarantine = Folder(spec.quarantine_uri.rstrip("/"), spec.output_format)

    def prepare(self) -> BatchReport | None:
        """Make the folder ready; return the stored report when an earlier run finished this very task.

        Raises:
            BatchError: the folder holds something else, and ``overwrite`` is off.
        """
        manifest = self.answers.read_manifest()
        same = manifest is not None and manifest["fingerprint"] == self._mark
        found = self.answers.parts() or self.quarantine.parts()
        if manifest is not None and same and manifest["report"] is not None:
            return BatchReport.model_validate(manifest["report"])
        if not same and not self._spec.overwrite and (manifest is not None or found):
            holds = f"the output of another spec, engine or input ({manifest['fingerprint']})" if manifest else found[0]
            raise BatchError(
                f"{self._spec.output} (or its quarantine) holds {holds}, this task is {self._mark}. Choose another "
                "output, delete it, or set overwrite=True."
            )
        if not same:
            self.answers.clear()
        # Rows that failed get another chance.
        self.quarantine.clear()
        self._write_manifest(None)
        return None

    def finish(self, report: BatchReport, ids: int, empty: pa.Schema) -> None:
        """Check that every row is there exactly once and write the manifest.

        Args:
            report: what the task counted.
            ids: checksum of the ids of all rows that were read, by this attempt and by earlier ones.
            empty: schema of the file that stands for an output without rows.

        Raises:
            BatchError: a row is missing or there twice.
        """
        if not self.answers.parts():
            self.answers.write(empty.empty_table())
        rows, found = 0, 0
        for chunk in itertools.chain(self.answers.id_chunks(), self.quarantine.id_chunks()):
            rows += len(chunk)
            found += checksum([chunk])
        if rows != report.rows_in or found % 2**64 != ids:
            raise BatchError(
                f"{report.rows_in} rows were read, but the {rows} in {self._spec.output} and its quarantine are not "
                "these. Something else wrote there, or a row was lost: choose another output, and report it."
            )
        self._write_manifest(report)

    def _write_manifest(self, report: BatchReport | None) -> None:
        manifest = {
            "fingerprint": self._mark,
            "spec": self._spec.model_dump(mode="json", exclude_defaults=True),
            "report": report.model_dump(mode="json") if report else None,
        }
        self.answers.write_bytes(MANIFEST, json.dumps(manifest, indent=1).encode())
