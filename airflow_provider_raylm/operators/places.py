"""Where rows come from and where answers go, as Airflow's authors say it: text, assets, paths."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import Asset, ObjectStoragePath

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs import Value


def plain(value: Any) -> Any:
    """Return *value* as a spec takes it: assets and paths as the text of a place, specs as dicts.

    Raises:
        SpecError: an asset has no place.
    """
    if isinstance(value, Value):
        # One that came through XCom has all fields set.
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Asset):
        if "://" not in value.uri:
            raise SpecError(f"The asset {value.name!r} names no place: give it the uri of its folder or file.")
        return value.uri
    if isinstance(value, ObjectStoragePath):
        # Without its connection, which `connections_of` tells.
        return f"{value.protocol}://{value.path}" if _connection_of(value) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def connections_of(batch: Any, conn_ids: str | Sequence[str] | None) -> list[str]:
    """Return the connections to storage: those given, and those that paths in a dict of BatchSpec's fields name."""
    given = [conn_ids] if isinstance(conn_ids, str) else [*(conn_ids or ())]
    fields = batch.values() if isinstance(batch, Mapping) else ()
    places = [one for value in fields for one in (value if isinstance(value, list | tuple) else [value])]
    named = [_connection_of(one) for one in places if isinstance(one, ObjectStoragePath)]
    return list(dict.fromkeys([*given, *filter(None, named)]))


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
