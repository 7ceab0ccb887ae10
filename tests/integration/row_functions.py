"""Functions that tasks name: they run on the cluster, in the task's Ray job."""

import ray


def with_namespace(row):
    """Add the Ray namespace in which the function runs, where it would find actors by their names."""
    return {**row, "namespace": ray.get_runtime_context().namespace}
