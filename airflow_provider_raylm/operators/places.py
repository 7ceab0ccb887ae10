"""Where rows come from and where answers go, as Airflow's authors say it: text, assets, paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from airflow.sdk import Asset, ObjectStoragePath

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs import Value, read_json_text


def plain(value: Any) -> Any:
    """Return *value* as a spec takes it: assets and paths as the text of a place, specs as dicts.

    Raises:
        SpecError: an asset has no place, or a path has options of its own, or is of a kind that Airflow does not know.
    """
    if isinstance(value, Value):
        # One that came through XCom has all fields set.
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Asset):
        if "://" not in value.uri:
            raise SpecError(f"The asset {value.name!r} names no place: give it the uri of its folder or file.")
        return value.uri
    if isinstance(value, ObjectStoragePath):
        return _place(value)
    if hasattr(value, "storage_options") and getattr(value, "protocol", "") not in ("", "file"):
        # Another of fsspec's paths, which older releases of it take for one of the system's.
        raise SpecError(f"The path {value} is of a kind that Airflow does not render: give text or ObjectStoragePath.")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def connections_of(fields: Any, conn_ids: Any) -> list[str]:
    """Return the connections to storage: those given, and those that paths in a spec's fields name.

    Args:
        fields: a spec's, or part of them.
        conn_ids: None, an id, a list of them, or the JSON text of these.

    Raises:
        SpecError: *conn_ids* is something else.
    """
    given = read_json_text(conn_ids)
    given = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) and one for one in given):
        raise SpecError(f"storage_conn_id: expected the id of a connection, or a list of them, got {conn_ids!r}")
    named = [_connection_of(path) for path in _paths_in(fields)]
    return list(dict.fromkeys([*given, *filter(None, named)]))


def _paths_in(value: Any) -> Iterator[ObjectStoragePath]:
    if isinstance(value, ObjectStoragePath):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for one in parts:
        yield from _paths_in(one)


def _place(path: ObjectStoragePath) -> str:
    """Return a path without its connection, which ``connections_of`` tells."""
    own = sorted({*path.storage_options} - {"conn_id"})
    if own:
        raise SpecError(
            f"The path {path} has options of its own ({', '.join(own)}): give them to the task, as "
            f"storage_options={{{path.protocol!r}: ...}}, or name a connection in the path's place."
        )
    return f"{path.protocol}://{path.path}" if _connection_of(path) else str(path)


def _connection_of(path: ObjectStoragePath) -> str | None:
    # Before Airflow 3.3 it is one of the file system's options.
    found: str | None = getattr(path, "conn_id", None) or path.storage_options.get("conn_id")
    return found


def assets_of(batch: Any) -> tuple[list[Asset], list[Asset]]:
    """Return the assets that a dict of BatchSpec's fields reads, and those that it writes."""
    if not isinstance(batch, Mapping):
        return [], []
    source, output = batch.get("source"), batch.get("output")
    sources = source if isinstance(source, list | tuple) else [source]
    return [one for one in sources if isinstance(one, Asset)], [output] if isinstance(output, Asset) else []
