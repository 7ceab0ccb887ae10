"""The Arrow type that a JSON Schema describes, and its values: what a typed answer becomes in a file.

Nothing of an answer is lost: what has no one type in Arrow (a union, an object of any properties, a schema that holds
itself) is its JSON text.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


class Unfit(Exception):
    """An answer is none of those that were asked for; its text says why, to the model as to the author."""


@dataclass(frozen=True)
class Shape:
    """A type, and how a JSON value becomes one of its values.

    Attributes:
        type: Arrow's.
        convert: takes a value that the schema holds, other than null; raises Unfit of one that the type cannot hold.
    """

    type: pa.DataType
    convert: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        """Return *value*, null included, as the type has it."""
        return None if value is None else self.convert(value)


def shape_of(schema: Any) -> Shape:
    """Return the shape of the values that a JSON Schema describes.

    ``null`` is allowed everywhere, as Arrow has it. A property that an answer leaves out is null. Dates become
    ``date32``, times ``timestamp[us, UTC]``; one without a zone is taken for UTC.
    """
    return _Shapes(schema).of(schema, ())


_FINER = re.compile(r"[.,]\d{6}\d*[1-9]")


def _require(value: Any, kind: type | tuple[type, ...], name: str) -> None:
    """Raise Unfit of a value of another type: what a pydantic model dumps may be other than its schema says."""
    # In Python, true is an integer.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Unfit(f"{repr(value)[:60]} is no {name}")


def _text(value: Any) -> str:
    _require(value, str, "string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit("it has half a character (a lone surrogate), which no file can hold") from None
    return str(value)


def _integer(value: Any) -> int:
    _require(value, (int, float), "integer")
    if not -(2**63) <= value < 2**63:
        raise Unfit(f"{value} is more than 64 bits hold")
    if value != int(value):
        raise Unfit(f"{value} is no integer")
    return int(value)


def _number(value: Any) -> float:
    _require(value, (int, float), "number")
    try:
        return float(value)
    except OverflowError:
        raise Unfit("a number is more than a double holds") from None


def _boolean(value: Any) -> bool:
    _require(value, bool, "boolean")
    return bool(value)


def _null(value: Any) -> None:
    raise Unfit(f"{repr(value)[:60]} is not null")


def _date(value: Any) -> datetime.date:
    _require(value, str, "date")
    try:
        return datetime.date.fromisoformat(value)
    except ValueError as error:
        raise Unfit(str(error)) from None


def _time(value: Any) -> datetime.datetime:
    _require(value, str, "date-time")
    if _FINER.search(value):
        # Python would leave the rest out without a word.
        raise Unfit(f"{value[:60]!r} is finer than a microsecond")
    try:
        # JSON Schema lets T and Z be small.
        found = datetime.datetime.fromisoformat(value.upper())
        return found.astimezone(datetime.UTC) if found.tzinfo else found.replace(tzinfo=datetime.UTC)
    except (ValueError, OverflowError) as error:
        raise Unfit(str(error)) from None


@dataclass(frozen=True)
class _List:
    """Converts lists; equal to another that converts alike."""

    item: Shape

    def __call__(self, values: Any) -> list[Any]:
        _require(values, list, "array")
        return [self.item(value) for value in values]


@dataclass(frozen=True)
class _Struct:
    """Converts objects; equal to another that converts alike."""

    members: tuple[tuple[str, Shape], ...]

    def __call__(self, value: Any) -> dict[str, Any]:
        _require(value, Mapping, "object")
        shapes = dict(self.members)
        if unknown := [name for name in value if name not in shapes]:
            raise Unfit(f"the property {unknown[0]!r} is none of {', '.join(shapes)}")
        return {name: shape(value.get(name)) for name, shape in shapes.items()}


JSON_TEXT = Shape(pa.string(), lambda value: _text(json.dumps(value, ensure_ascii=False)))
_STRING = Shape(pa.string(), _text)
_INTEGER = Shape(pa.int64(), _integer)
_NUMBER = Shape(pa.float64(), _number)
# A column of nulls alone has no type of its own in every format.
_NULL = Shape(pa.string(), _null)
_SCALARS = {
    "string": _STRING,
    "integer": _INTEGER,
    "number": _NUMBER,
    "boolean": Shape(pa.bool_(), _boolean),
    "null": _NULL,
}
_FORMATS = {"date": Shape(pa.date32(), _date), "date-time": Shape(pa.timestamp("us", "UTC"), _time)}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_UNIONS = ("anyOf", "oneOf")
# By which a schema leaves what its values hold to other schemas, and by which it says so itself.
_BY_OTHERS = ("$ref", "$dynamicRef", "allOf", *_UNIONS)
_BY_ITSELF = (
    "properties",
    "patternProperties",
    "additionalProperties",
    "items",
    "prefixItems",
    "if",
    "dependentSchemas",
)
# What says of the other words of a schema that they are not all.
_OPEN = (
    "additionalProperties",
    "allOf",
    "if",
    "not",
    "patternProperties",
    "dependentSchemas",
    "propertyNames",
    "unevaluatedProperties",
)


def _says(schema: Mapping[str, Any], words: tuple[str, ...]) -> bool:
    """Return whether a schema has one of some words, other than to forbid what it would allow."""
    return any(schema.get(word, False) is not False for word in words)


class _Shapes:
    def __init__(self, root: Any) -> None:
        self._root = root

    def of(self, schema: Any, inside: tuple[str, ...]) -> Shape:
        """Return a schema's shape.

        Args:
            schema: a part of the whole.
            inside: the references that led here.
        """
        if not isinstance(schema, Mapping):
            return JSON_TEXT
        others = [word for word in _BY_OTHERS if word in schema]
        if len(others) > 1 or (others and _says(schema, _BY_ITSELF)):
            # A value may have what one of them names and another does not.
            return JSON_TEXT
        if (reference := schema.get("$ref")) is not None:
            found = self._resolve(reference)
            return JSON_TEXT if found is None or reference in inside else self.of(found, (*inside, reference))
        if len(schema.get("allOf", ())) == 1 and "type" not in schema:
            return self.of(schema["allOf"][0], inside)
        for union in _UNIONS:
            if union in schema:
                return self._union(schema[union], inside)
        kinds = self._kinds(schema)
        if len(kinds) != 1:
            return self._one([_SCALARS.get(kind, JSON_TEXT) for kind in kinds])
        return self._typed(kinds[0], schema, inside)

    def _kinds(self, schema: Mapping[str, Any]) -> list[str]:
        """Return the names of the types of a schema's values, without null where there are others."""
        kinds = schema.get("type")
        if kinds is None and ("enum" in schema or "const" in schema):
            told = schema.get("enum", [schema.get("const")])
            kinds = [_TYPES.get(type(one), "object") for one in told]
        if kinds is None:
            kinds = "object" if "properties" in schema else "array" if "items" in schema else []
        found = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
        return [kind for kind in found if kind != "null"] or found

    def _typed(self, kind: str, schema: Mapping[str, Any], inside: tuple[str, ...]) -> Shape:
        if kind == "string":
            return _FORMATS.get(str(schema.get("format")), _STRING)
        if kind == "array":
            return self._array(schema, inside)
        if kind == "object":
            return self._object(schema, inside)
        return _SCALARS.get(kind, JSON_TEXT)

    def _array(self, schema: Mapping[str, Any], inside: tuple[str, ...]) -> Shape:
        if "items" not in schema or "prefixItems" in schema or not isinstance(schema["items"], Mapping):
            return JSON_TEXT
        item = self.of(schema["items"], inside)
        return Shape(pa.list_(item.type), _List(item))

    def _object(self, schema: Mapping[str, Any], inside: tuple[str, ...]) -> Shape:
        properties = schema.get("properties")
        if not properties or _says(schema, _OPEN):
            return JSON_TEXT
        members = tuple((name, self.of(one, inside)) for name, one in properties.items())
        return Shape(pa.struct([(name, shape.type) for name, shape in members]), _Struct(members))

    def _union(self, members: Any, inside: tuple[str, ...]) -> Shape:
        shapes = [self.of(member, inside) for member in members]
        # However else null is described, and wherever: by its type, a value, a reference.
        return self._one([shape for shape in shapes if shape != _NULL] or shapes)

    def _one(self, shapes: list[Shape]) -> Shape:
        """Return the one shape that holds what all do."""
        # Not the types alone: text beside JSON text would not tell which it is.
        found = set(shapes)
        if len(found) == 1:
            return shapes[0]
        return _NUMBER if found == {_INTEGER, _NUMBER} else JSON_TEXT

    def _resolve(self, reference: str) -> Any:
        """Return what a reference within the schema leads to; None for any other."""
        if not reference.startswith("#"):
            return None
        found = self._root
        for step in reference[1:].strip("/").split("/") if reference != "#" else []:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or step not in found:
                return None
            found = found[step]
        return found
