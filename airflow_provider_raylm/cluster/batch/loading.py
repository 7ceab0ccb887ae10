"""The author's own code, by the name that a spec gives it."""

from __future__ import annotations

import importlib
from typing import Any

from airflow_provider_raylm.errors import BatchError


def load(field: str, path: str) -> Any:
    """Return what ``package.module:name`` is.

    Raises:
        BatchError: it cannot be imported; the text names the spec's field.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BatchError(f"{field}: cannot import {path} on the cluster: {error}") from error
