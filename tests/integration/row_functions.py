"""Functions and types that tasks name: they run on the cluster, in the task's Ray job."""

from typing import Annotated

import ray
from pydantic import AfterValidator


def _refuse(value):
    raise ValueError("never right")


Refused = Annotated[bool, AfterValidator(_refuse)]


def with_namespace(row):
    """Add the Ray namespace in which the function runs, where it would find actors by their names."""
    return {**row, "namespace": ray.get_runtime_context().namespace}
