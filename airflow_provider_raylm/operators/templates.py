"""What Jinja fills in when a task runs, and what it could not read then."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

from airflow_provider_raylm.errors import SpecError

# To read only: nothing is rendered.
_JINJA = Environment(autoescape=True)


def is_deferred(value: object) -> bool:
    """Return whether Airflow fills in (part of) the value when the task runs."""
    if isinstance(value, str):
        return "{{" in value or "{%" in value
    if isinstance(value, Mapping):
        return any(is_deferred(one) for one in value.values())
    if isinstance(value, list | tuple):
        return any(is_deferred(one) for one in value)
    # As Airflow tells what it has to resolve: another task's output, an argument of a mapped task group.
    return value is None or (hasattr(value, "resolve") and not isinstance(value, os.PathLike))


def has_marks(text: str) -> bool:
    """Return whether Jinja would take something in *text* for its own."""
    return any(mark in text for mark in ("{{", "{%", "{#"))


def require_templates(where: str, value: Any) -> None:
    """Refuse text that Jinja cannot read, or would leave out in silence.

    Raises:
        SpecError: there is some; the text names the field.
    """
    if isinstance(value, Mapping):
        for name, one in value.items():
            require_templates(f"{where}.{name}", one)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            require_templates(f"{where}.{number}", one)
    elif isinstance(value, str) and "{" in value:
        wrong = _not_jinja(value)
        if wrong:
            raise SpecError(
                f"{where}: {wrong}. Airflow renders it as a Jinja template; text that is none goes into "
                "airflow.sdk.literal(...), or between {% raw %} and {% endraw %}."
            )


def _not_jinja(text: str) -> str | None:
    try:
        parsed = _JINJA.parse(text)
        comments = any(kind == "comment_begin" for _, kind, _ in _JINJA.lex(text))
    except TemplateSyntaxError as error:
        return f"Jinja cannot read it: {error.message}"
    if comments:
        return "what stands between {# and #} is a comment for Jinja, which leaves it out"
    within_text = [output.nodes for output in parsed.find_all(nodes.Output) if len(output.nodes) > 1]
    if any(_is_number(one) for several in within_text for one in several):
        return "a number between {{ and }} is a value for Jinja, which leaves the braces out"
    return None


def _is_number(node: nodes.Node) -> bool:
    """Return whether nobody writes that for Jinja, but for LaTeX, a regular expression or a format."""
    if isinstance(node, nodes.Tuple):
        return all(map(_is_number, node.items))
    return isinstance(node, nodes.Const) and type(node.value) in (int, float)


def require_no_templates(where: str, value: Any, unrendered: Collection[int]) -> None:
    """Refuse templates in what came from another task: they would go to the cluster as they are.

    Args:
        where: the field.
        value: its value before it is rendered.
        unrendered: the ``id`` of each object, in it or around it, that Airflow does not render.

    Raises:
        SpecError: there is one; the text names the field.
    """
    if id(value) in unrendered and is_deferred(value):
        raise SpecError(
            f"{where}: {value!r} has a Jinja template, and Airflow renders none in what another task returned, because "
            "that may be anybody's text. Put it into partial(...), or have the other task return the final text; text "
            "with such braces that is no template can be returned by the function of an @engine.task."
        )
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, one in parts:
        require_no_templates(f"{where}.{name}", one, unrendered)
