"""``raylm quarantine``: the failed rows of a task by reason, read here and now, so that no log ever carries a row."""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from airflow_provider_raylm.cli.console import cut, one_line, say, table
from airflow_provider_raylm.credentials import storage_of
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import RESERVED_PREFIX

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_provider_raylm.cluster.batch.storage import Place

REASON, MESSAGE, ROW_ID = (f"{RESERVED_PREFIX}{name}" for name in ("reason", "message", "row_id"))
_FOLDER = "_quarantine"
_PART = "part-"
_MESSAGE_CHARACTERS = 300
_VALUE_CHARACTERS = 80
Row = dict[str, str]


def run(arguments: argparse.Namespace) -> int:
    """Show the failed rows below a place."""
    if find_spec("pyarrow") is None:
        raise BatchError(
            "Reading a quarantine needs pyarrow on this machine: pip install pyarrow, and the storage's own package "
            "(s3fs, gcsfs, adlfs)."
        )
    with _credentials(arguments.storage_conn):
        output, quarantine, parts = _found(arguments.path)
        state = _state(output)
        reasons: Counter[str] = Counter()
        examples: dict[str, list[Row]] = {}
        for part in parts:
            _count(part, reasons, examples, arguments.examples)
    if not reasons:
        say(f"no failed rows in {quarantine}")
        return 0
    say(f"{reasons.total()} failed rows in {quarantine}")
    say()
    table(("REASON", "ROWS"), reasons.most_common())
    for reason, _ in reasons.most_common():
        for row in examples[reason]:
            say()
            _show(reason, row)
    say()
    say(_advice(state, quarantine))
    return 0


@contextmanager
def _credentials(conn_ids: list[str]) -> Iterator[None]:
    """Let fsspec know the storage's connections while the body runs."""
    from fsspec.config import conf

    with patch.dict(conf, storage_of(conn_ids, {})):
        yield


def _found(path: str) -> tuple[Place | None, str, list[Place]]:
    """Return the output if that is known, the quarantine's address, and its parts.

    Raises:
        BatchError: there is neither an output nor a quarantine.
    """
    from airflow_provider_raylm.cluster.batch.storage import Place

    path = path.rstrip("/") or path
    place = Place(path)
    below = [name.removeprefix(f"{place.path}/") for name in place.files()]
    if "_manifest.json" in below or any(name.startswith(f"{_FOLDER}/{_PART}") for name in below):
        own = _manifest(place).get("spec", {}).get("quarantine")
        folder = Place(own) if own else place.below(_FOLDER)
        return place, folder.uri, _parts(folder)
    parts = _parts(place)
    if not parts:
        raise BatchError(
            f"There is nothing at {path} that a task has written. Name a task's output, or its quarantine; a "
            "quarantine without failed rows is no folder on an object store."
        )
    output = Place(path.removesuffix(f"/{_FOLDER}")) if path.endswith(f"/{_FOLDER}") else None
    return output, path, parts


def _parts(folder: Place) -> list[Place]:
    names = [name.removeprefix(f"{folder.path}/") for name in folder.files()]
    return [folder.below(name) for name in names if name.startswith(_PART)]


def _state(output: Place | None) -> str:
    return str(_manifest(output).get("state", "")) if output is not None else ""


def _manifest(output: Place) -> dict[str, Any]:
    from airflow_provider_raylm.cluster.batch.storage import reading

    place = output.below("_manifest.json")
    try:
        with reading(place.uri, "a manifest"):
            manifest: dict[str, Any] = json.loads(place.read())
            return manifest
    except BatchError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise


def _read(part: Place) -> tuple[list[str], Callable[[int], Row]]:
    """Return the reasons of a part's rows, and what gives the texts of one of them.

    Raises:
        BatchError: it cannot be read, or holds no failed rows.
    """
    import pyarrow.parquet as pq

    from airflow_provider_raylm.cluster.batch.storage import reading

    try:
        with reading(part.uri, "failed rows"):
            if part.uri.endswith(".jsonl"):
                # Not by pyarrow, which bounds the length of a line: a prompt that is too long is a failed row.
                rows = [json.loads(line) for line in part.read().splitlines()]
                return [row[REASON] for row in rows], lambda at: {name: str(one) for name, one in rows[at].items()}
            table = pq.read_table(io.BytesIO(part.read()))
            return table[REASON].to_pylist(), lambda at: {
                name: _text(table[name].slice(at, 1)) for name in table.column_names
            }
    except KeyError:
        raise BatchError(
            f"{part.uri} has answers, not failed rows: name the task's output, or its quarantine."
        ) from None


def _count(part: Place, reasons: Counter[str], examples: dict[str, list[Row]], most: int) -> None:
    told, row = _read(part)
    for at, reason in enumerate(told):
        reasons[reason] += 1
        kept = examples.setdefault(reason, [])
        if len(kept) < most:
            kept.append(row(at))


def _text(cell: pa.ChunkedArray) -> str:
    """Return a value as text; what passed by as Arrow may be no value that Python knows."""
    try:
        return str(cell.to_pylist()[0])
    except Exception:
        return f"({cell.type})"


def _show(reason: str, row: Row) -> None:
    say(f"{one_line(reason)}, row {one_line(row[ROW_ID])}: {cut(row[MESSAGE], _MESSAGE_CHARACTERS)}")
    for name, value in row.items():
        if name not in (REASON, MESSAGE, ROW_ID):
            say(f"    {one_line(name)}: {cut(value, _VALUE_CHARACTERS)}")


def _advice(state: str, quarantine: str) -> str:
    again = f'engine.infer("again", source="{quarantine}", ..., output="…") asks them in a task of their own'
    retry = "clear the task, or let it retry: missing and failed rows are asked again in place"
    if state == "complete":
        return f"The task is complete, and clearing it asks nothing. {again}; they are whole, and keep their ids."
    if state:
        return f"The task is not complete: {retry}."
    return f"If the task is not complete, {retry}. If it is, {again}."
