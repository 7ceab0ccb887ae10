"""What every value that crosses a border has in common: frozen, strict, plain JSON on the wire, errors by field."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError

from airflow_provider_raylm.errors import SpecError

RESERVED_PREFIX = "raylm_"
"""Columns with this prefix are written by the provider: row id, token counts, finish reason, failure."""


class Value(BaseModel):
    """A frozen value that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


SpecT = TypeVar("SpecT", bound=Value)


def build(spec: type[SpecT], value: object) -> SpecT:
    """Return *value* (a spec already, or a mapping) as *spec*.

    Raises:
        SpecError: a field is unknown, missing or bad; every one is named with its reason.
    """
    if isinstance(value, spec):
        return value
    try:
        return spec.model_validate(value)
    except ValidationError as error:
        raise SpecError(_explain(spec, error.errors())) from None


def check_unrendered(spec: type[Value], value: object, is_deferred: Any) -> None:
    """Check, when the DAG is parsed, whatever of *value* is known by then.

    ``is_deferred(field_value)`` says which top-level fields Airflow fills in later (a Jinja template, another
    task's output); those are left out, and a rule that spans fields is only applied when every field is known.

    Raises:
        SpecError: a known field is bad, or a field is unknown.
    """
    if is_deferred(value) or isinstance(value, spec):
        return
    if not isinstance(value, dict):
        raise SpecError(f"{spec.__name__}: expected a {spec.__name__} or a dict, got {type(value).__name__}")
    deferred = {field for field, content in value.items() if is_deferred(content)}
    try:
        spec.model_validate({field: content for field, content in value.items() if field not in deferred})
    except ValidationError as error:
        left = [e for e in error.errors() if not deferred or (e["loc"] and e["loc"][0] not in deferred)]
        if left:
            raise SpecError(_explain(spec, left)) from None
    unknown = deferred - set(spec.model_fields)
    if unknown:
        raise SpecError(f"{spec.__name__}.{sorted(unknown)[0]}: unknown field; known are {_known(spec)}")


def _explain(spec: type[Value], errors: list[Any]) -> str:
    lines = []
    for error in errors:
        where = ".".join([spec.__name__, *(str(part) for part in error["loc"])])
        reason = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            reason = f"unknown field; known are {_known(spec)}" if len(error["loc"]) == 1 else "unknown field"
        lines.append(f"{where}: {reason}")
    return "\n".join(lines)


def _known(spec: type[Value]) -> str:
    return ", ".join(spec.model_fields)


def _from_json_text(value: object) -> object:
    """Read JSON text: what a Jinja template makes of a mapping (``{{ params.engine_kwargs | tojson }}``)."""
    return json.loads(value) if isinstance(value, str) else value


JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_from_json_text)]
