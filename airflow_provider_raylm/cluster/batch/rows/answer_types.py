"""What an answer's text has to be: any text, one of a few, text that matches, or a value of a JSON Schema.

The engine is held to it while it writes (vLLM's structured outputs), and what it wrote is checked: an answer may be cut
off, and no grammar knows all that a schema says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from jsonschema import exceptions, validators
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from airflow_provider_raylm.cluster.batch.loading import load
from airflow_provider_raylm.cluster.batch.rows.arrow_types import Unfit, shape_of
from airflow_provider_raylm.cluster.batch.rows.references import REGISTRY, require_references
from airflow_provider_raylm.errors import BatchError
from airflow_provider_raylm.specs import Step


@dataclass(frozen=True)
class AnswerType:
    """How a text becomes a value.

    Attributes:
        type: Arrow's type of the value.
        read: takes the text, and raises Unfit when that is none.
        constraint: what vLLM is told (its ``structured_outputs``); None for any text.
    """

    type: pa.DataType
    read: Callable[[str], Any]
    constraint: dict[str, Any] | None = None


def answer_type(step: Step) -> AnswerType:
    """Return what a step's answers have to be.

    Raises:
        BatchError: its schema is none, or its model cannot be imported.
    """
    found = _answer_type(step)
    return replace(found, read=_row_alone(found.read))


def _row_alone(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return *read* so that whatever an answer sets off is that answer's fault: a model's own code, a depth, a size."""

    def alone(text: str) -> Any:
        try:
            return read(text)
        except (Unfit, MemoryError):
            raise
        except RecursionError:
            raise Unfit("it is nested too deep to be checked") from None
        except Exception as error:
            raise Unfit(f"it cannot be checked: {type(error).__name__}: {error}") from error

    return alone


def _answer_type(step: Step) -> AnswerType:
    if step.output_schema is not None:
        return _typed(step.output_schema)
    if step.choice is not None:
        return AnswerType(pa.string(), lambda text: _one_of(text, step.choice), {"choice": list(step.choice)})
    if step.regex is not None:
        pattern = re.compile(step.regex)
        return AnswerType(pa.string(), lambda text: _matching(text, pattern), {"regex": step.regex})
    if step.grammar is not None:
        return AnswerType(pa.string(), str, {"grammar": step.grammar})
    return _of_extra_body(step.extra_body)


def _of_extra_body(body: Mapping[str, Any]) -> AnswerType:
    """Return text that is what vLLM's own fields ask for: an answer that is cut off is half of it.

    Raises:
        BatchError: one of them is none that vLLM knows.
    """
    asked, outputs = (_object(body, name, "extra_body") for name in ("response_format", "structured_outputs"))
    where = "extra_body.structured_outputs.json"
    schema = outputs.get("json")
    if told := _object(asked, "json_schema", "extra_body.response_format"):
        where = "extra_body.response_format.json_schema.schema"
        schema = told.get("schema") or schema
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise BatchError(f"{where}: expected a JSON Schema, but its text is no JSON: {error}") from None
    if asked.get("type") == "json_object" or outputs.get("json_object"):
        schema = {"type": "object"}
    if schema is None:
        return AnswerType(pa.string(), str)
    validate = _validator(schema, where)

    def read(text: str) -> str:
        validate(_json(text))
        return text

    return AnswerType(pa.string(), read)


def _object(fields: Mapping[str, Any], name: str, inside: str) -> Mapping[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise BatchError(f"{inside}.{name}: expected an object, as vLLM's OpenAI API has it, got {value!r:.60}")
    return value


def _one_of(text: str, choice: Any) -> str:
    if text not in choice:
        raise Unfit(f"{text[:60]!r} is none of {', '.join(map(repr, choice))}")
    return text


def _matching(text: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text):
        raise Unfit(f"{text[:60]!r} does not match {pattern.pattern}")
    return text


def _typed(schema: Any) -> AnswerType:
    if isinstance(schema, str):
        return _of_model(schema)
    validate = _validator(schema, "output_schema")
    shape = shape_of(schema)

    def read(text: str) -> Any:
        value = _json(text)
        validate(value)
        return shape(value)

    return AnswerType(shape.type, read, {"json": schema})


def _validator(schema: Any, field: str) -> Callable[[Any], None]:
    """Return a function that raises Unfit of a value that a JSON Schema does not hold.

    Raises:
        BatchError: the schema is none, or refers to what it does not have.
    """
    if not isinstance(schema, Mapping | bool):
        raise BatchError(f"{field}: expected a JSON Schema, got {schema!r:.60}")
    if isinstance(schema, Mapping) and not isinstance(schema.get("$schema", ""), str):
        raise BatchError(f"{field}.$schema: expected the address of a dialect, got {schema['$schema']!r:.60}")
    kind = validators.validator_for(schema, validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except exceptions.SchemaError as error:
        where = "".join(f".{part}" for part in error.absolute_path)
        raise BatchError(f"{field}{where}: {error.message}") from None
    require_references(schema, kind.META_SCHEMA["$schema"], field)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER, registry=REGISTRY)

    def validate(value: Any) -> None:
        error = exceptions.best_match(validator.iter_errors(value))
        if error is not None:
            where = ".".join(map(str, error.absolute_path))
            raise Unfit(f"{where}: {error.message}" if where else error.message)

    return validate


def _of_model(path: str) -> AnswerType:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(load("output_schema", path))
        asked, written = (adapter.json_schema(mode=mode) for mode in ("validation", "serialization"))
    except PydanticUserError as error:
        raise BatchError(f"output_schema: {path} is no type that pydantic knows: {error}") from None
    shape = shape_of(written)

    def read(text: str) -> Any:
        told = _json(text)
        try:
            value = adapter.validate_json(json.dumps(told))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise Unfit(f"{where}: {first['msg']}" if where else first["msg"]) from None
        return shape(adapter.dump_python(value, mode="json", by_alias=True))

    return AnswerType(shape.type, read, {"json": asked})


def _json(text: str) -> Any:
    try:
        # vLLM's grammars let control characters into strings, which JSON escapes.
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, strict=False)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is no JSON: {error}") from None


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Unfit(f"{text[:60]} is more than a double holds")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is none of JSON's numbers")
