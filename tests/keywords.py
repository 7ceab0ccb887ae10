"""Writes ``airflow_provider_raylm/keywords.py`` from the specs: ``python -m tests.keywords``, when one has changed."""

import inspect
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from airflow.sdk import BaseOperator

from airflow_provider_raylm import keywords
from airflow_provider_raylm.operators.base import DeferrableRayLMOperator, RayLMOperator
from airflow_provider_raylm.operators.checks import FIELDS
from airflow_provider_raylm.operators.raylm import BatchInferenceOperator, DeployEngineOperator, TeardownEngineOperator
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, Value

# What shared_engine and its tasks say themselves.
OWN = {"self", "kwargs", "task_id", "engine", "batch", "default_args"}
# Types that are spelt with names which are there for everybody, or which keywords.py imports.
SPELT = {
    "str",
    "int",
    "float",
    "bool",
    "None",
    "timedelta",
    "datetime",
    "Sequence[str]",
    "Any",
    "dict[str, Any]",
    "OnBusy",
}
HEAD = '''"""The keywords of ``shared_engine`` and ``engine.infer``, for editors and type checkers.

Made from the specs and the operators by ``python -m tests.keywords``; a test compares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, TypedDict

from airflow.sdk import ObjectStoragePath
from airflow.sdk.definitions._internal.mixins import ResolveMixin

from airflow_provider_raylm.specs import OnBusy

Later = str | ResolveMixin
"""What becomes a value when the task runs: a template, another task's output, a literal."""
Place = Later | os.PathLike[str] | ObjectStoragePath
"""A file, a folder or a glob: also as an asset or a path."""
'''
PLACES = {"source": "Place | Sequence[Place] | Mapping[str, Any]", "output": "Place"}


def kinds(annotation):
    """Return what somebody writes in a DAG for a field of that type, apart from text."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for one in get_args(annotation) for kind in kinds(one)]
    if origin is tuple and get_args(annotation)[-1] is not ...:
        return [f"tuple[{', '.join(spelt(one) for one in get_args(annotation))}] | Sequence[Any]"]
    if origin is tuple:
        return [f"Sequence[{spelt(get_args(annotation)[0])}]"]
    if origin is dict or (inspect.isclass(annotation) and issubclass(annotation, Value)):
        return ["Mapping[str, Any]"]
    if origin is Literal:
        return [f"Literal[{', '.join(map(repr, get_args(annotation)))}]".replace("'", '"')]
    return ["None" if annotation is type(None) else "" if annotation is str else annotation.__name__]


def spelt(annotation):
    found = dict.fromkeys(kind for kind in [*kinds(annotation), "Later"] if kind)
    return " | ".join(sorted(found, key="None".__eq__))


def of_spec(spec):
    return {name: PLACES.get(name) or spelt(field.annotation) for name, field in spec.model_fields.items()}


def of_operators(*operators):
    found = {}
    for operator in operators:
        for name, parameter in inspect.signature(operator.__init__).parameters.items():
            text = parameter.annotation if isinstance(parameter.annotation, str) else ""
            known = text and all(one in SPELT for one in text.split(" | "))
            found[name] = text if known else "Any"
    return {name: one for name, one in found.items() if name not in OWN and name not in {"replace", "redeploy"}}


def tables():
    """Return the fields of each TypedDict, and which one it extends."""
    common = of_operators(BaseOperator, RayLMOperator, DeferrableRayLMOperator)
    batch = of_spec(BatchSpec) | {name: "Later | None" for name in FIELDS if name not in BatchSpec.model_fields}
    own = lambda operator: of_operators(operator)  # noqa: E731
    return {
        "TaskArguments": ("TypedDict, total=False", "Of every task of this package, and of Airflow.", common),
        "DeployArguments": ("TaskArguments, total=False", "Of the deploy task.", own(DeployEngineOperator)),
        "TeardownArguments": ("TaskArguments, total=False", "Of the teardown task.", own(TeardownEngineOperator)),
        "EngineFields": (
            "TypedDict, total=False",
            "EngineSpec's fields, without the name.",
            {name: one for name, one in of_spec(EngineSpec).items() if name != "name"},
        ),
        "BatchFields": ("TypedDict, total=False", "BatchSpec's fields.", batch),
        "InferenceArguments": (
            "TaskArguments, total=False",
            "Of an inference task, apart from BatchSpec's fields.",
            {**own(BatchInferenceOperator), "redeploy": "Mapping[str, Any] | Later | None"},
        ),
        "InferArguments": ("BatchFields, InferenceArguments, total=False", "Of ``engine.infer``.", {}),
        "DecoratedArguments": (
            "InferenceArguments, total=False",
            "Of ``@engine.task``.",
            {"task_id": "str", "batch": "BatchFields", "render_returned": "bool"},
        ),
    }


def text():
    """Return the module's source."""
    parts = [HEAD]
    for name, (bases, meaning, fields) in tables().items():
        inherited = tables()["TaskArguments"][2] if name != "TaskArguments" else {}
        lines = [f"    {field}: {one}\n" for field, one in fields.items() if field not in inherited]
        parts.append(f'\n\nclass {name}({bases}):\n    """{meaning}"""\n' + ("\n" if lines else "") + "".join(lines))
    return "".join(parts)


if __name__ == "__main__":
    Path(keywords.__file__).write_text(text())
