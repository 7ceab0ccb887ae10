"""Secrets that the nodes hold as files, in the environment of whatever serves the engine on them.

Ray shows the environment that a task or actor is given by its runtime_env; what a process reads from a file is its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from airflow_provider_raylm.errors import EngineError

_FILES = "RAYLM_SECRET_FILES"


def load(files: Mapping[str, str]) -> None:
    """Put the content of each variable's file into this process's environment.

    Raises:
        EngineError: a file cannot be read on this node.
    """
    os.environ.update({name: _read(path) for name, path in files.items()})


def load_named() -> None:
    """Do as ``load`` with the files that ``loaded_by_workers`` names; Ray calls this when a worker starts."""
    load(json.loads(os.environ[_FILES]))


def loaded_by_workers(files: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a runtime_env whose workers load *files* themselves, before they run anything.

    They name files and hold no secret. The runtime_env's field for such a hook only works for whole jobs.
    """
    if not files:
        return {}
    return {_FILES: json.dumps(dict(files)), WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{load_named.__name__}"}


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"secret_env: cannot read {path} on this node: {error}") from None
