"""What is known of an input file: how to read it, what it is, and what a look at it told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from airflow_provider_raylm.specs import RESERVED_PREFIX, Format

ROW_ID = f"{RESERVED_PREFIX}row_id"


@dataclass(frozen=True)
class Reading:
    """How the author says that files are to be read.

    Attributes:
        format: of all files; None for what each file's suffix says.
        delimiter: between the cells of CSV; None for what the file says, a comma, or a tab in ``.tsv``.
        escape: what a quote within quotes stands behind in CSV; None where it is doubled.
        encoding: of CSV, JSON and text.
        id_column: column with the rows' ids; None for an earlier task's, or none.
    """

    format: Format | None = None
    delimiter: str | None = None
    escape: str | None = None
    encoding: str = "utf-8"
    id_column: str | None = None


@dataclass(frozen=True)
class File:
    """One input file.

    Attributes:
        uri: its one address.
        format: by its name in a spec.
        compression: by pyarrow's names, or None.
        size: bytes.
        version: changes when its content does.
    """

    uri: str
    format: Format
    compression: str | None
    size: int
    version: str


@dataclass(frozen=True)
class Contents:
    """What a look at a file tells.

    Attributes:
        schema: its columns; of JSON with the types of its values, null where it has none.
        rows: how many, or None when only reading all of it would tell.
        ids: hashes of the ids that a column of it gives its rows, or None.
    """

    schema: pa.Schema
    rows: int | None
    ids: np.ndarray[Any, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Fragment:
    """A file as the plan knows it.

    Attributes:
        number: its place in the sorted list of the task's files.
        file: where and what it is.
        rows: how many; None when only reading it tells.
        partition: columns that its path tells (``day=2026-01-01/``); None for Hive's null.
        has_ids: whether a column of it gives its rows' ids.
    """

    number: int
    file: File
    rows: int | None
    partition: tuple[tuple[str, str | None], ...] = ()
    has_ids: bool = False
