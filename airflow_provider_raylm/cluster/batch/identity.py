"""What an output is the answer to: while nothing of it changes, a retry continues where an earlier attempt ended."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from airflow_provider_raylm.cluster.batch.fragments import Fragment
from airflow_provider_raylm.cluster.batch.stage import load_function
from airflow_provider_raylm.naming import fingerprint
from airflow_provider_raylm.specs import BatchSpec, EngineRef


def task_fingerprint(spec: BatchSpec, ref: EngineRef, fragments: Iterable[Fragment]) -> str:
    """Return 12 hex digits of all that can change an answer: the question, the model, the exact input."""
    files = [(fragment.file.uri, fragment.file.version) for fragment in fragments]
    code = [_source_code(name, getattr(spec, name)) for name in ("preprocess", "postprocess")]
    models = [step.output_schema for step in spec.all_steps if isinstance(step.output_schema, str)]
    code += [_source_code("output_schema", path) for path in models]
    content = [fingerprint(spec), ref.answers or ref.fingerprint, files, code]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _source_code(name: str, path: str | None) -> list[tuple[str, str]] | None:
    """Return what answers depend on of a function or a model: its package's modules, as far as it has imported them."""
    if load_function(name, path) is None or path is None:
        return None
    root = path.partition(":")[0].partition(".")[0]
    own = {one: module for one, module in sys.modules.copy().items() if one == root or one.startswith(f"{root}.")}
    return [(one, _digest_of(module)) for one, module in sorted(own.items())]


def _digest_of(module: ModuleType) -> str:
    try:
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()
    except OSError:
        # A folder of modules, or no file.
        return ""
