"""What every value that crosses a border has in common: frozen, strict, plain JSON on the wire, errors by field."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from airflow_provider_raylm.errors import SpecError

RESERVED_PREFIX = "raylm_"
"""Columns with this prefix are written by the provider: row id, token counts, finish reason, failure."""

_REMOVED_IN = "0.3"
# Through which a name passes from where somebody wrote it.
_BETWEEN = frozenset({__name__.partition(".")[0], "airflow", "contextlib", "pydantic"})


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _NamesWhatIsWrong(ModelMetaclass):
    """Has a value that is built wrongly raise this package's own error."""

    # Hidden from type checkers, which would no longer see a value's fields.
    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **fields: Any) -> Any:
            try:
                return super().__call__(*args, **fields)
            except ValidationError as error:
                raise SpecError(_explain(cls, error.errors())) from None


class Value(BaseModel, metaclass=_NamesWhatIsWrong):
    """A frozen value that refuses fields it does not know, and takes a list or an object as JSON text, too.

    Raises:
        SpecError: a field is unknown, missing or bad; every one is named with its reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    old_names: ClassVar[Mapping[str, str]] = {}
    """Today's names of fields by their first, which are read for a while; fingerprints are made of them for good."""

    @model_validator(mode="before")
    @classmethod
    def _read_given(cls, given: Any) -> Any:
        """Read old names, and what a Jinja template makes of a list or an object (``{{ params.x | tojson }}``)."""
        given = read_json_text(given)
        if not isinstance(given, Mapping):
            return given
        given = with_new_names(cls, given)
        structured = _structured_fields(cls)
        return {name: read_json_text(one) if name in structured else one for name, one in given.items()}

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return *obj* as this value.

        Raises:
            SpecError: a field is unknown, missing or bad.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise SpecError(_explain(cls, error.errors())) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with the values of *update*, of which pydantic checks nothing: an old name would be lost."""
        return super().model_copy(update=update and with_new_names(type(self), update), deep=deep)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise SpecError(_explain(type(self), error.errors())) from None


SpecT = TypeVar("SpecT", bound=Value)


def build(spec: type[SpecT], value: object) -> SpecT:
    """Return *value* (a spec already, or a mapping) as *spec*.

    Raises:
        SpecError: a field is unknown, missing or bad; every one is named with its reason.
    """
    if isinstance(value, spec):
        return value
    return spec.model_validate(value)


def with_new_names(spec: type[Value], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return *given*, of which some may be fields of *spec*, with today's names in the place of old ones.

    Where mappings are put together, each is read so before: else one field would be there under both of its names.

    Raises:
        SpecError: a field is given by both.
    """
    renamed = {old: new for old, new in spec.old_names.items() if old in given}
    for old, new in renamed.items():
        if new in given:
            raise SpecError(f"{old}: its name is {new} now, which is given, too")
        text = f"{spec.__name__}.{old} is called {new} now; the old name is removed in {_REMOVED_IN}"
        # No DeprecationWarning, which Python shows to nobody in a file of DAGs.
        warnings.warn(text, FutureWarning, stacklevel=_level_of_author())
    return {renamed.get(name, name): value for name, value in given.items()} if renamed else given


def _level_of_author() -> int:
    """Return how far up, for a warning of whoever calls this, a spec is written; 1 when nobody's code is there."""
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        if frame.f_back is None:
            return 1
        frame, level = frame.f_back, level + 1
    return level


def check_unrendered(spec: type[Value], value: object, is_deferred: Any) -> None:
    """Check, when the DAG is parsed, whatever of *value* is known by then.

    ``is_deferred(field_value)`` says which top-level fields Airflow fills in later (a Jinja template, another
    task's output); those are left out, and a rule that spans fields is only applied when every field is known.

    Raises:
        SpecError: a known field is bad, or a field is unknown.
    """
    if isinstance(value, spec) or (not isinstance(value, dict) and is_deferred(value)):
        return
    if not isinstance(value, dict):
        raise SpecError(f"{spec.__name__}: expected a {spec.__name__} or a dict, got {type(value).__name__}")
    value = with_new_names(spec, value)
    deferred = {field for field, content in value.items() if is_deferred(content)}
    try:
        # Not by the value's own method: what is left out here is no error.
        spec.__pydantic_validator__.validate_python({n: one for n, one in value.items() if n not in deferred})
    except ValidationError as error:
        left = [e for e in error.errors() if not deferred or (e["loc"] and e["loc"][0] not in deferred)]
        if left:
            raise SpecError(_explain(spec, left)) from None
    unknown = deferred - set(spec.model_fields)
    if unknown:
        raise SpecError(f"{spec.__name__}.{sorted(unknown)[0]}: unknown field; known are {_known(spec)}")


def _explain(spec: type[Value], errors: list[Any]) -> str:
    lines: dict[tuple[str, str], str] = {}
    for error in errors:
        # Without the names that pydantic gives to the members of a union.
        where = ".".join([spec.__name__, *(str(part) for part in error["loc"] if "[" not in str(part))])
        reason = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            reason = f"unknown field; known are {_known(spec)}" if len(error["loc"]) == 1 else "unknown field"
        elif error["type"] in STRUCTURED and isinstance(error["input"], str):
            reason = (
                f"expected {STRUCTURED[error['type']]}, got the text {error['input'][:60]!r}, which is no JSON of "
                "one; a template makes it with the filter tojson"
            )
        lines.setdefault((where, error["type"] if error["type"] not in STRUCTURED else ""), f"{where}: {reason}")
    return "\n".join(lines.values())


def _known(spec: type[Value]) -> str:
    return ", ".join(spec.model_fields)


def read_json_text(value: Any) -> Any:
    """Return the list or object whose JSON text *value* is; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "null")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


STRUCTURED = {"dict_type": "an object", "model_type": "an object", "list_type": "a list", "tuple_type": "a list"}


@cache
def _structured_fields(spec: type[Value]) -> frozenset[str]:
    """Return the names of the fields that may hold a list, an object or another value, also beside text."""
    return frozenset(name for name, field in spec.model_fields.items() if is_structured(field.annotation))


def is_structured(annotation: Any) -> bool:
    """Return whether a value may be a list, an object or another value."""
    return any(
        isinstance(kind, type) and issubclass(kind, tuple | list | Mapping | Value) for kind in _choices(annotation)
    )


def _choices(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _choices(one)
    else:
        yield origin or annotation


JsonObject = dict[str, JsonValue]
