"""Fields that hold templates, and fields of which each row may tell the value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from airflow_provider_raylm.specs.base import is_structured, read_json_text

PLACEHOLDER = re.compile(r"\$\$\{|\$\{([^{}]+)\}")
"""``$${`` stands for ``${``, ``${column}`` for a row's value."""
_COLUMN = re.compile(r"\$\{([^{}]+)\}")


def placeholders(template: str) -> list[str]:
    """Return the column names in *template*, in order of appearance."""
    return [match.group(1) for match in PLACEHOLDER.finditer(template) if match.group(1)]


def column_of(value: object) -> str | None:
    """Return the column that a field is told by (``"${column}"``, and nothing else), or None."""
    match = _COLUMN.fullmatch(value) if isinstance(value, str) else None
    return match and match.group(1)


@dataclass(frozen=True)
class PerRow:
    """Lets a field be ``"${column}"`` instead of a value; then each row tells the value.

    Args:
        kind: the type of a value.
    """

    kind: Any

    @property
    def value(self) -> Any:
        """The type of a value, of which a list or an object may be JSON text: an author's as a row's."""
        return Annotated[self.kind, BeforeValidator(read_json_text)] if is_structured(self.kind) else self.kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Tell the two apart before either is looked at, so that an error speaks of what was meant."""
        # Names in brackets are left out of errors.
        schema: CoreSchema = core_schema.tagged_union_schema(
            {"[value]": handler.generate_schema(self.value), "[column]": core_schema.str_schema()},
            discriminator=lambda given: "[value]" if column_of(given) is None else "[column]",
        )
        return core_schema.nullable_schema(schema) if type(None) in get_args(source) else schema
