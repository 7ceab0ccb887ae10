"""Which files a source names, and what their paths tell of their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import get_args
from urllib.parse import unquote

import pyarrow as pa
from fsspec.core import has_magic
from fsspec.utils import glob_translate

from airflow_provider_raylm.cluster.batch.formats import format_of
from airflow_provider_raylm.cluster.batch.fragments import File, Reading
from airflow_provider_raylm.cluster.batch.storage import Info, Place, is_partition, version
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import BatchSpec, Format
from airflow_provider_raylm.specs.batch import is_hidden

_FORMATS = ", ".join(get_args(Format))
_HIVE = re.compile(r"([^=/]+)=([^/]*)")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

Say = Callable[[str], None]


def list_files(spec: BatchSpec, how: Reading, say: Say) -> list[File]:
    """Return the files that the spec's source names, sorted; in a folder, those of a format that is read.

    Hidden ones (``_``, ``.``) are left out; so are those of no known format, such as a README, and Parquet without
    bytes, with a line about each.

    Raises:
        BatchError: a file, folder or glob that matches nothing; a named file of no known format; a name that fsspec
            takes for something else; a place where the task itself writes.
    """
    found: dict[str, File] = {}
    own = {Place(uri).name for uri in (spec.output, spec.quarantine_uri)}
    for source in spec.sources:
        place = Place(source)
        found |= {file.uri: file for file in _files_of(place, how, say)}
        _require_elsewhere(spec, place, own)
    for uri in found:
        if uri.rpartition("/")[0] in own:
            raise BatchError(
                f"source: {uri} lies in {uri.rpartition('/')[0]}, where this task writes its own answers or failed "
                "rows. Choose another output."
            )
    return [found[uri] for uri in sorted(found)]


def _files_of(place: Place, how: Reading, say: Say) -> Iterator[File]:
    matches = _matches(place)
    if not matches:
        raise BatchError(f"source {place.uri!r} matches no file. Check the path and the pattern.")
    named = set(matches) == {place.path}
    others = empty = 0
    for path, info in matches.items():
        told = format_of(path, how.format)
        if told is None and named:
            raise BatchError(f"{place.uri}: unknown suffix; set source_format to one of {_FORMATS}")
        if told is None:
            others += 1
        elif told[0] == "parquet" and info.get("size") == 0 and not named:
            # A writer that failed leaves it.
            empty += 1
        else:
            uri = _readable(str(place.fs.unstrip_protocol(path)), place)
            yield File(uri, told[0], told[1], int(info.get("size") or 0), version(info))
    if others:
        say(f"{others} files in {place.uri} are left out: their suffixes tell no format that is read")
    if empty:
        say(f"{empty} files in {place.uri} are left out: they have no bytes, and so no rows")
    if others + empty == len(matches):
        raise BatchError(
            f"source {place.uri!r} has no file of a format that is read ({others} of its files have other suffixes, "
            f"{empty} no bytes). Check the path, or set source_format to one of {_FORMATS}."
        )


def _readable(uri: str, place: Place) -> str:
    """Refuse a name by which fsspec opens something else: another file system, or an earlier version of a file."""
    for part in ("::", "?versionid=") if place.in_object_store else ("::",):
        if part in uri.lower():
            raise BatchError(f"{uri}: the name of this file has {part!r}, which fsspec takes for its own. Rename it.")
    return uri


def _matches(place: Place) -> dict[str, Info]:
    found = place.matching() if has_magic(place.path) else {}
    if found:
        root = re.split(r"[^/]*[*?\[]", place.path, maxsplit=1)[0].rstrip("/")
    else:
        # Brackets may be a name's own.
        found = place.files()
        root = place.path
    return {
        path: info
        for path, info in found.items()
        if not path.endswith("/") and not is_hidden(path.removeprefix(root).strip("/"))
    }


def _require_elsewhere(spec: BatchSpec, source: Place, own: set[str]) -> None:
    """Refuse an output that the source would take in when it is read again."""
    for place in own:
        path = Place(place).path
        if has_magic(source.path):
            parts = path.split("/")
            folders = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
            taken = [f"{path}/part-0.parquet", *filter(is_partition, folders)]
            inside = any(map(re.compile(glob_translate(source.path)).match, taken))
        else:
            inside = f"{path}/".startswith(f"{source.path}/") and not is_hidden(
                path.removeprefix(source.path).strip("/")
            )
        if inside and source.fs.unstrip_protocol(path) == place:
            raise BatchError(
                f"{place}, where this task writes, lies in its source {source.uri!r}: a retry would read its own "
                f"answers. Choose an output outside (now {spec.output})."
            )


def partition_of(uri: str, schema: pa.Schema) -> tuple[tuple[str, str | None], ...]:
    """Return the columns that a path tells, as text: 01 is no number. What the file says itself goes before."""
    pairs = [match.groups() for part in uri.split("/")[:-1] if (match := _HIVE.fullmatch(part))]
    columns = {unquote(name): None if value == _HIVE_NULL else unquote(value) for name, value in pairs}
    return tuple((name, value) for name, value in columns.items() if name not in schema.names)
