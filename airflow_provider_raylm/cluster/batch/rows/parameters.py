"""Sampling fields that each row tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from airflow_provider_raylm.cluster.batch.exchange import RowError
from airflow_provider_raylm.cluster.batch.rows.templates import Row, required
from airflow_provider_raylm.specs import Step
from airflow_provider_raylm.specs.base import STRUCTURED
from airflow_provider_raylm.specs.per_row import PerRow


def compile_parameters(step: Step) -> Callable[[Row], str]:
    """Return a function that gives what a row asks otherwise than the others, as JSON text; "" for nothing.

    Raises (the returned function):
        RowError: a value is null, or none that the field may have (``invalid_parameter``).
    """
    told = step.row_parameters
    if not told:
        return lambda row: ""
    adapters: list[tuple[str, str, TypeAdapter[Any]]] = [
        (name, column, TypeAdapter(_kind(name))) for name, column in told.items()
    ]

    def overrides(row: Row) -> str:
        chosen = {}
        for name, column, adapter in adapters:
            try:
                # In vLLM's requests an adapter is a model.
                chosen["model" if name == "adapter" else name] = adapter.validate_python(required(row, column))
            except ValidationError as error:
                first = error.errors()[0]
                kind = STRUCTURED.get(first["type"])
                why = f"expected {kind}, or its JSON text" if kind else first["msg"]
                raise RowError("invalid_parameter", f"{name} from column {column!r}: {why}") from None
        return json.dumps(chosen)

    return overrides


def _kind(name: str) -> Any:
    """Return the type of a field's value."""
    return next(one.value for one in Step.model_fields[name].metadata if isinstance(one, PerRow))
