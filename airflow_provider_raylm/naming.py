"""Names that stay the same over the retries of a run, so that a retry finds what an earlier try made."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_provider_raylm.specs import BatchSpec, EngineSpec, Labels

APPLICATION_PREFIX = "raylm-"
ENGINE_DEPLOYMENT = "engine"
LEASE_DEPLOYMENT = "lease"


def _digest(*parts: object) -> str:
    """Hash *parts* unambiguously: ("a", "bc") and ("ab", "c") differ."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _slug(text: str, length: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-")


def application_name(labels: Labels) -> str:
    """Return the Serve application of one run's engine, ``raylm-<engine>-<hash>``.

    The name holds neither the try number nor any character of the run id, which may contain anything.
    """
    owner = _digest(labels.installation, labels.dag_id, labels.run_id, labels.engine)
    return f"{APPLICATION_PREFIX}{_slug(labels.engine, 40)}-{owner[:10]}"


def fingerprint(spec: EngineSpec | BatchSpec) -> str:
    """Return 12 hex digits that change when *spec* asks for something else, not when it only waits longer.

    Only what differs from the defaults counts, so that a field that a later version adds changes nothing. One that
    a later version renames counts by its first name.
    """
    left_out: dict[str, Any] = dict.fromkeys(spec.not_identity, True)
    left_out |= {name: set(value.not_identity) for name, value in spec if hasattr(value, "not_identity")}
    content = spec.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    first = {new: old for old, new in spec.old_names.items()}
    return _digest({first.get(name, name): value for name, value in content.items() if value != {}})[:12]


def answers_fingerprint(spec: EngineSpec) -> str:
    """Return 12 hex digits that change when the engine may answer something else."""
    return _digest(spec.answers_from)[:12]


def submission_id(verb: str, task: tuple[str, str, str, int], content: object, attempt: int) -> str:
    """Return the Ray submission id of one task's job.

    Args:
        verb: what the job does.
        task: (dag_id, run_id, task_id, map_index).
        content: the job's payload, as JSON values: a changed one never attaches to an old job.
        attempt: 1 for the first job; one more for each that ended, never the try number.
    """
    return f"raylm-{verb}-{_slug(task[2], 40)}-{_digest(task, content)[:12]}-{attempt}"
