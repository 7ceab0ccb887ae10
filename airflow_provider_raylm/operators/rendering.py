"""How a task's fields become values: Jinja makes text of them, and prompts may stand in files beside the DAG."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import ObjectStoragePath, literal
from airflow.sdk.definitions.context import render_template_as_native, render_template_to_string
from jinja2 import Environment, Template, TemplateNotFound, UndefinedError
from jinja2.nativetypes import NativeEnvironment

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.operators.retries import no_retries_in_vain
from airflow_provider_raylm.operators.templates import has_marks, is_deferred
from airflow_provider_raylm.specs import read_json_text

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator as Operator
    from airflow.sdk import Context
else:
    Operator = object

PROMPT_FILE = "prompt_file"
"""A field of a dict that becomes a BatchSpec or a Step: the file that its prompt is in."""

_TEMPLATES = (".jinja", ".jinja2", ".j2")


class RendersText(Operator):
    """Renders its fields as text, also in a DAG with ``render_template_as_native_obj``.

    The specs know what a field is. That setting guesses: the text ``1`` of an environment variable becomes a number,
    and a quoted word loses its quotes.
    """

    # Template fields that are not this package's.
    rendered_as_the_dag_says: ClassVar[tuple[str, ...]] = ()

    def text_env(self) -> Environment:
        """Return the environment in which Jinja makes text of this task's fields, and finds files."""
        dag = self.get_dag()
        env = self.get_template_env() if dag is None else dag.get_template_env(force_sandboxed=True)
        # Jinja drops a newline at the end: of a file's text that is right, of the stop string "\n" nothing is left.
        return env.overlay(keep_trailing_newline=True)

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: Environment,
        seen_oids: set[int],
    ) -> None:
        """Render as Airflow does, with another environment for this package's fields.

        Raises:
            SpecError: a template asks for what is not there; the text names the field.
        """
        for name in template_fields:
            env = jinja_env if name in self.rendered_as_the_dag_says else self.text_env()
            try:
                super()._do_render_template_fields(parent, [name], context, env, seen_oids)
            except UndefinedError as error:
                with no_retries_in_vain():
                    raise SpecError(f"{name}: a template asks for what is not there: {error}") from None

    def render_template(
        self, content: Any, context: Context, jinja_env: Environment | None = None, seen_oids: set[int] | None = None
    ) -> Any:
        """Render as Airflow does, but in ``text_env`` keep every line break of text that a field has.

        Text without a template stays the same, too: Jinja would make its line breaks all alike. Paths, which Airflow
        leaves alone, are text.
        """
        dags = jinja_env.linked_to if jinja_env is not None else None
        # On Airflow 3.1 a path on an object store is one of the system's, too.
        is_path = isinstance(content, os.PathLike) and not isinstance(content, ObjectStoragePath)
        if dags is not None and is_path and id(content) not in (seen_oids or ()):
            content = os.fspath(content)
        if jinja_env is None or dags is None or not isinstance(content, str):
            return super().render_template(content, context, jinja_env, seen_oids)
        if not _has_template(content, dags):
            return content
        # Files that the text includes are the DAG's environment's.
        return self._render(dags.from_string(jinja_env.parse(content)), context)

    def _render(self, template: Template, context: Context, dag: Any = None) -> Any:
        native = isinstance(template.environment, NativeEnvironment)
        return (render_template_as_native if native else render_template_to_string)(template, context)


def _has_template(text: str, env: Environment) -> bool:
    marks = (env.variable_start_string, env.block_start_string, env.comment_start_string)
    return any(mark in text for mark in (*marks, env.line_statement_prefix, env.line_comment_prefix) if mark)


def read_prompts(batch: Any, env: Environment) -> Any:
    """Return a dict of BatchSpec's fields, as Airflow can render it, with the text of prompt files in their place.

    Files are looked for where Airflow looks for templates: in the DAG's folder and its ``template_searchpath``. One
    that ends with ``.jinja``, ``.jinja2`` or ``.j2`` is a template; any other is taken as it is. A name that Airflow
    has yet to render is left.

    Raises:
        SpecError: there is no such file, or a prompt beside it.
    """

    def read(path: Any) -> dict[str, Any]:
        if is_deferred(path):
            return {PROMPT_FILE: path}
        text = _read(path, env)
        return {"prompt": text if path.endswith(_TEMPLATES) or not has_marks(text) else literal(text)}

    return _with_prompts(batch, read)


def render_prompts(task: RendersText, batch: Any, context: Context) -> Any:
    """Return rendered fields of a BatchSpec with the text of the prompt files whose names have been rendered, too.

    Raises:
        SpecError: there is no such file, or a prompt beside it.
    """
    env = task.text_env()

    def read(path: Any) -> dict[str, Any]:
        text = _read(path, env)
        return {"prompt": task.render_template(text, context, env) if path.endswith(_TEMPLATES) else text}

    batch = read_json_text(batch)
    if isinstance(batch, Mapping) and "steps" in batch:
        batch = {**batch, "steps": read_json_text(batch["steps"])}
    return _with_prompts(batch, read)


def without_files(batch: Any) -> Any:
    """Return a dict of BatchSpec's fields with prompts that are not known yet in the place of their files."""
    return _with_prompts(batch, lambda path: {"prompt": None})


def _with_prompts(batch: Any, read: Callable[[Any], dict[str, Any]]) -> Any:
    """Return a dict of BatchSpec's fields with what *read* makes of prompt files; without any, the very same dict."""
    if not isinstance(batch, Mapping):
        return batch
    changed: dict[str, Any] = {}
    steps = batch.get("steps")
    if isinstance(steps, list | tuple):
        changed["steps"] = [_with_prompts(step, read) for step in steps]
        if all(new is old for new, old in zip(changed["steps"], steps, strict=True)):
            del changed["steps"]
    path = batch.get(PROMPT_FILE)
    if path is not None:
        if batch.get("prompt") is not None:
            raise SpecError(f"{PROMPT_FILE}: prompt is given, too")
        changed |= read(path)
    if not changed and PROMPT_FILE not in batch:
        return batch
    return {**{name: one for name, one in batch.items() if name != PROMPT_FILE}, **changed}


def _read(path: Any, env: Environment) -> str:
    if not isinstance(path, str):
        raise SpecError(f"{PROMPT_FILE}: expected the name of a file, got {path!r}")
    if env.loader is None:
        raise SpecError(f"{PROMPT_FILE}: {path} is looked for beside a DAG, and there is none")
    try:
        text = env.loader.get_source(env, path)[0]
    except TemplateNotFound:
        folders = ", ".join(map(str, getattr(env.loader, "searchpath", ())))
        raise SpecError(
            f"{PROMPT_FILE}: there is no file {path} in {folders}; the DAG's template_searchpath adds folders"
        ) from None
    # As Jinja does: the newline that editors put at the end is none of the prompt's.
    return text.removesuffix("\n")
