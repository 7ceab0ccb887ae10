"""References of a JSON Schema: each has to lead to a schema within the same one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema_specifications import REGISTRY as SPECIFICATIONS
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from airflow_provider_raylm.errors import BatchError

# JSON Schema's own schemas, and no others: jsonschema would ask the network for any other, row by row.
REGISTRY: Registry[Any] = SPECIFICATIONS
_WORDS = ("$ref", "$dynamicRef")


def require_references(schema: Any, dialect: str, field: str) -> None:
    """Check that whatever a schema refers to is there.

    Args:
        schema: a valid one.
        dialect: address of the schema that it is written by.
        field: where the author wrote it.

    Raises:
        BatchError: a reference leads nowhere, or to what is no schema.
    """
    specification = specification_with(dialect)
    root: Resource[Any] = specification.create_resource(schema)
    waiting = [(root, REGISTRY.resolver_with_root(root))]
    seen = set()
    while waiting:
        resource, resolver = waiting.pop()
        contents = resource.contents
        if not isinstance(contents, Mapping) or id(contents) in seen:
            continue
        seen.add(id(contents))
        for word in _WORDS:
            reference = contents.get(word)
            if reference is None:
                continue
            try:
                found = resolver.lookup(reference)
            except Unresolvable:
                raise BatchError(
                    f"{field}: its {word} {reference!r} leads nowhere; write what it stands for within the schema "
                    "(under $defs)"
                ) from None
            if not isinstance(found.contents, Mapping | bool):
                raise BatchError(f"{field}: its {word} {reference!r} leads to no schema, but {found.contents!r:.60}")
            waiting.append((specification.create_resource(found.contents), found.resolver))
        waiting += [(one, resolver.in_subresource(one)) for one in resource.subresources()]
