"""What a Ray job runs: ``python -m airflow_provider_raylm.cluster deploy|infer|plan|preview|teardown|sweep``.

The request is JSON in the environment; the outcome is the last line of the output, behind a sentinel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ray

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster import surroundings
from airflow_provider_raylm.errors import ClusterError, RayLMError
from airflow_provider_raylm.specs import BatchSpec, EngineRef, EngineSpec, Labels, Progress, Value, build
from airflow_provider_raylm.wire import (
    NAMESPACE_VARIABLE,
    REQUEST_VARIABLE,
    error_line,
    progress_line,
    result_line,
    said_line,
)

_numbers = itertools.count(1)


def say(line: str) -> None:
    """Print a line for the task's log."""
    print(said_line(next(_numbers), surroundings.hidden(line)), flush=True)


def tell(progress: Progress, due: bool) -> None:
    """Print how far a task is, for whoever looks at the end of the log; *due*: for the task's log, too."""
    print(surroundings.hidden(progress_line(next(_numbers) if due else None, progress)), flush=True)


def _deploy(payload: dict[str, Any]) -> Value:
    from airflow_provider_raylm.cluster.engine import deploy

    spec, labels = build(EngineSpec, payload["engine"]), build(Labels, payload["labels"])
    return deploy.deploy(spec, labels, payload["replace"], say)


def _infer(payload: dict[str, Any]) -> Value:
    from airflow_provider_raylm.cluster.batch import pipeline

    spec, ref = build(BatchSpec, payload["batch"]), build(EngineRef, payload["engine"])
    redeploy = build(EngineSpec, payload["redeploy"]) if "redeploy" in payload else None
    return pipeline.infer(spec, ref, say, redeploy, tell, payload.get("price_per_gpu_hour"))


def _plan(payload: dict[str, Any]) -> Value:
    from airflow_provider_raylm.cluster.batch import preview

    return preview.plan(build(BatchSpec, payload["batch"]), say)


def _preview(payload: dict[str, Any]) -> Value:
    from airflow_provider_raylm.cluster.batch import trial

    spec, ref = build(BatchSpec, payload["batch"]), build(EngineRef, payload["engine"])
    pad = surroundings.entered().pad if payload["texts"] else None
    return trial.look(spec, ref, payload["rows"], payload["spread"], pad, say)


def _teardown(payload: dict[str, Any]) -> Value:
    from airflow_provider_raylm.cluster.engine import retire

    return retire.teardown(say=say, **payload)


def _sweep(payload: dict[str, Any]) -> Value:
    from airflow_provider_raylm.cluster.engine import retire

    return retire.sweep(tuple(payload["delete"]), payload["max_age"], payload["installation"], say)


VERBS: dict[str, Callable[[dict[str, Any]], Value]] = {
    "deploy": _deploy,
    "infer": _infer,
    "plan": _plan,
    "preview": _preview,
    "teardown": _teardown,
    "sweep": _sweep,
}


def check_version(worker: str) -> None:
    """Refuse to work for a worker of another version: the two must mean the same by a spec.

    Raises:
        ClusterError: the versions differ.
    """
    if worker != __version__:
        raise ClusterError(
            f"The Airflow worker runs airflow-provider-raylm {worker}, the cluster {__version__}. Install the same "
            'version on both, or let the connection ship the worker\'s (extra {"ship_package": true}).'
        )


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and print its outcome; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m airflow_provider_raylm.cluster", description=__doc__)
    parser.add_argument("verb", choices=sorted(VERBS))
    verb = parser.parse_args(arguments).verb
    try:
        request = json.loads(os.environ[REQUEST_VARIABLE])
        check_version(request["version"])
        ray.init(namespace=os.environ.get(NAMESPACE_VARIABLE), log_to_driver=False, logging_level=logging.CRITICAL)
        # Ray reports the same failure from several layers; the outcome below tells it once.
        for name in ("ray", "ray.data", "ray.serve"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        surroundings.received(request["env_vars"], request["secret_env"]).enter()
        result = VERBS[verb](request["payload"])
    except Exception as error:
        if not isinstance(error, RayLMError):
            print(surroundings.hidden(traceback.format_exc()), flush=True)
        print(surroundings.hidden(error_line(error)), flush=True)
        return 1
    print(result_line(result.model_dump(mode="json")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
