"""What a job was given beside its payload: the author's variables, secrets, and credentials for storage.

A process of the job enters them before it does anything: they are in its memory alone then. What Ray shows of a job, a
task or an actor has the names of files and of a package, whose content Ray shows to nobody.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fsspec.config import conf
from ray.experimental import internal_kv

from airflow_provider_raylm.cluster.replica import secret_env
from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.sealing import PAD
from airflow_provider_raylm.wire import HANDED_VARIABLE, taken

# Of options of file systems, those whose values are secrets.
_SECRET = re.compile(r"key|secret|token|password|sas|connection_string|credential", re.IGNORECASE)
_SHOWN = "***"


@dataclass(frozen=True)
class Surroundings:
    """See the module.

    Attributes:
        env_vars: the author's, which this process has anyway.
        secret_env: variables, each with the file on a node that holds its value.
        storage: options of fsspec's file systems, by protocol.
        pad: hides what the job reports from all but who handed it over; empty without one.
    """

    env_vars: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict)
    storage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    pad: bytes = field(default=b"", repr=False)

    def enter(self) -> None:
        """Let this process have them.

        Raises:
            EngineError: a secret's file cannot be read on this node.
        """
        global _entered
        secret_env.load(self.secret_env)
        for protocol, options in self.storage.items():
            conf[protocol] = {**conf.get(protocol, {}), **options}
        _entered = self


_entered = Surroundings()


def entered() -> Surroundings:
    """Return those of this process."""
    return _entered


def received(env_vars: list[str], secret_env: Mapping[str, str]) -> Surroundings:
    """Return what this job was given, and take what only it may see away from where it was left.

    Raises:
        ClusterError: it is not there any more.
    """
    place = os.environ.pop(HANDED_VARIABLE, None)
    storage = _take(place.encode()) if place else {}
    pad = base64.b64decode(storage.pop(PAD, ""))
    return Surroundings({name: os.environ[name] for name in env_vars}, secret_env, storage, pad)


def _take(place: bytes) -> dict[str, Any]:
    content = internal_kv._internal_kv_get(place)
    if content is None:
        raise ClusterError(
            "The credentials for the storage are not there any more: Ray keeps them for ten minutes, and this job "
            "began later. Retry; and where jobs wait for long, bound them by an Airflow pool."
        )
    internal_kv._internal_kv_del(place)
    return taken(content)


def hidden(text: str) -> str:
    """Return *text* without the secrets that this process was given."""
    values = {os.environ.get(name, "") for name in _entered.secret_env} | set(_secrets(_entered.storage))
    # Also as JSON writes them. What is so short is no secret, and may stand anywhere.
    forms = {form for value in values if len(value) > 3 for form in (value, json.dumps(value)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, _SHOWN)
    return text


def _secrets(options: Any, secret: bool = False) -> list[str]:
    """Return the texts in nested options whose name says that they, or what they lie in, are secret."""
    if isinstance(options, Mapping):
        return [one for name, value in options.items() for one in _secrets(value, secret or bool(_SECRET.search(name)))]
    return [options] if secret and isinstance(options, str) else []
