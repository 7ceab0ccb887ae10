"""Everything this package raises on purpose, in one small tree.

RayLMError
├── SpecError      the author's value cannot work; also a ValueError; raised before anything is submitted
├── ClusterError   the way to Ray: dashboard unreachable, refused token, job lost, versions differ
├── EngineError    the engine: cannot start, does not fit, belongs to somebody else
│   └── EngineGone   there is none, and none comes back by itself: no retry helps
└── BatchError     the rows: unreadable source, missing column, too many failed rows, counts that do not add up

An error crosses from the cluster to Airflow as ``{"type": ..., "message": ...}`` (see ``to_wire``), so that the
task in Airflow fails with the same class and sentence that the cluster raised.
"""

from __future__ import annotations


class RayLMError(Exception):
    """Base of every error of this package; its text says what went wrong, where, and what to do."""


class SpecError(RayLMError, ValueError):
    """A value of a spec cannot work. Raised when the spec is built, with the field's name."""


class ClusterError(RayLMError):
    """The Ray cluster could not be reached, refused the request, or lost the job."""


class EngineError(RayLMError):
    """The engine could not be deployed, does not fit the cluster, or is gone."""


class EngineGone(EngineError):
    """There is no engine, and none comes back by itself; the text says which task to clear."""


class BatchError(RayLMError):
    """An inference task could not read, answer or account for its rows."""


_BY_NAME: dict[str, type[RayLMError]] = {
    cls.__name__: cls for cls in (RayLMError, SpecError, ClusterError, EngineError, EngineGone, BatchError)
}


def to_wire(error: BaseException) -> dict[str, str]:
    """Return *error* as plain JSON values, by its class in the tree; one of another origin is named in the message."""
    if isinstance(error, RayLMError):
        kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _BY_NAME)
        return {"type": kind, "message": str(error)}
    return {"type": "RayLMError", "message": f"{type(error).__name__}: {error}"}


def from_wire(wire: dict[str, str]) -> RayLMError:
    """Rebuild the error that ``to_wire`` described; an unknown type becomes a plain RayLMError."""
    return _BY_NAME.get(wire.get("type", ""), RayLMError)(wire.get("message", "no message"))
