"""From a spec to Ray's own LLM deployment, in two halves: what the driver deploys and what the replica loads.

Ray's ``build_llm_deployment`` does both at once and imports vLLM for it: ten seconds and more in a driver that has no
other use for it. Here the driver says what a replica asks of the cluster, and the replica makes Ray's ``LLMConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.util.accelerators import accelerators

from airflow_provider_raylm.cluster.batch.window import BUSY_BLOCKS
from airflow_provider_raylm.cluster.engine.resources import bundles
from airflow_provider_raylm.cluster.routing import RowsRouter
from airflow_provider_raylm.cluster.surroundings import entered
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.naming import ENGINE_DEPLOYMENT
from airflow_provider_raylm.specs import EngineSpec

# Ray's own choice for engines.
PLACEMENT = "PACK"
# Serve looks so often whether a replica that is to go still answers, and first looks after that time: 2 s by default.
SHUTDOWN_LOOK_S = 0.2
# Serve replaces a replica after three checks that failed. Its default of 10 s leaves a GPU without an engine for longer
# than that; a check is a message to vLLM's scheduler and back.
HEALTH_CHECK_PERIOD_S = 2
# By whether it has a GPU: an engine on CPUs answers late when the machine is busy; that is not ill health.
_HANG_TIMEOUT_S = {True: 90.0, False: 360.0}
# Seconds until Serve ends a replica that is to go, with what it still works on.
SHUTDOWN_S = 20.0
DRAIN_S = 3600.0
# Of a GPU's memory; vLLM's own default, which it takes for a whole GPU.
_MEMORY_SHARE = 0.92
# Serve imports it in the replica.
_REPLICA = "airflow_provider_raylm.cluster.replica.server"
_SERVER = f"{_REPLICA}.BlockLLMServer"


def llm_deployment(spec: EngineSpec) -> Any:
    """Return the engine as a Serve application that is not deployed yet.

    Raises:
        EngineError: the cluster lacks vLLM, or what Ray's part for it needs, or its Ray has no such accelerator.
    """
    if spec.accelerator_type:
        _require_known(spec.accelerator_type)
    missing = [module for module in ("vllm", "jsonref") if find_spec(module) is None]
    if missing:
        raise EngineError(
            f"The cluster's Python lacks {' and '.join(missing)}. Its image needs ray[data,serve], vllm at the version "
            f"that Ray {ray.__version__} pins, and jsonref (see the installation page)."
        )
    replicas: dict[str, Any] = {"num_replicas": spec.replicas}
    if isinstance(spec.replicas, tuple):
        low, high = spec.replicas
        # In blocks; Ray's default for engines would never start a second replica.
        scaling = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": BUSY_BLOCKS}
        replicas = {"autoscaling_config": scaling}
    around = entered()
    env = {name: value for name, value in around.env_vars.items() if name not in spec.secret_env} | spec.env
    if spec.gpus_per_worker:
        # Read by vLLM's engine process, a child of the replica: what each of its workers asks of its bundle. Ray only
        # sets it for the task that makes vLLM's configuration, and refuses a whole GPU's worker in a part's bundle.
        env["VLLM_RAY_PER_WORKER_GPUS"] = str(spec.gpus_per_worker)
    # The job's, so that the replica finds this package; but not its variables, which carry the request.
    runtime_env = {**ray.get_runtime_context().runtime_env, "env_vars": env}
    deployment = serve.deployment(
        name=ENGINE_DEPLOYMENT,
        max_ongoing_requests=spec.max_ongoing_requests,
        ray_actor_options={"num_cpus": spec.num_cpus, "runtime_env": runtime_env},
        placement_group_bundles=bundles(spec),
        placement_group_strategy=PLACEMENT,
        # A start that failed fails again; the task's own retry is the place to try once more.
        max_constructor_retry_count=1,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # Serve gives a replica up after three checks without an answer.
        health_check_timeout_s=hang_timeout(spec) / 3,
        # Only an engine that autoscales loses replicas that are well: what they work on may take its time. A replica
        # that is not well, or whose engine is deleted, gives its rows up by itself, so that nothing waits for this.
        graceful_shutdown_timeout_s=DRAIN_S if isinstance(spec.replicas, tuple) else SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        request_router_config=RequestRouterConfig(request_router_class=RowsRouter),
        **replicas,
    )
    secrets = {name: file for name, file in around.secret_env.items() if name not in env}
    loaded = spec.model_copy(update={"secret_env": {**secrets, **spec.secret_env}})
    return deployment(_SERVER).bind(loaded.model_dump(mode="json"))


def hang_timeout(spec: EngineSpec) -> float:
    """Return the seconds without a sign of life after which a replica is replaced."""
    return spec.hang_timeout or _HANG_TIMEOUT_S[spec.gpus_per_worker > 0]


def llm_config(spec: EngineSpec, adapters: Mapping[str, Any] | None = None) -> Any:
    """Translate a spec into Ray's LLMConfig; imports vLLM, starts nothing.

    Args:
        spec: the engine.
        adapters: vLLM's arguments for the spec's adapters, which depend on what is in their files.

    Raises:
        ValueError: Ray or vLLM refuses an argument.
    """
    from ray.serve.llm import LLMConfig

    gpus = spec.gpus_per_worker
    at_start = {"secret_env": dict(spec.secret_env), "download": not spec.model.startswith("/")}
    return LLMConfig(
        model_loading_config={
            "model_id": spec.effective_model_name,
            "model_source": spec.model,
            **({"tokenizer_source": spec.tokenizer} if spec.tokenizer else {}),
        },
        engine_kwargs={
            # Ray starts every engine with vLLM's sizes for an API server; this one only does batch work.
            "performance_mode": "throughput",
            "disable_log_stats": not spec.log_engine_metrics,
            # vLLM would take a whole GPU's memory, and the next engine on it would not start.
            **({"gpu_memory_utilization": round(_MEMORY_SHARE * gpus, 4)} if 0 < gpus < 1 else {}),
            **({} if spec.task == "generate" else {"runner": "pooling"}),
            **(adapters or {}),
            **spec.engine_kwargs,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "pipeline_parallel_size": spec.pipeline_parallel_size,
            **({"tokenizer": spec.tokenizer} if spec.tokenizer else {}),
        },
        accelerator_type=spec.accelerator_type,
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        # The replica's own CPUs are in the first of these bundles, too: resources.bundles says all.
        placement_group_config={"bundle_per_worker": {"GPU": gpus}} if gpus else {"bundles": [{"CPU": 0}]},
        deployment_config={"ray_actor_options": {"num_cpus": spec.num_cpus}},
        callback_config={"callback_class": f"{_REPLICA}.NodeStart", "callback_kwargs": at_start},
        log_engine_metrics=spec.log_engine_metrics,
    )


def _require_known(accelerator_type: str) -> None:
    """Look the name up among those that the cluster's Ray gives to nodes with such GPUs.

    Raises:
        EngineError: it is none; the text has the nearest.
    """
    # Ray's engines on TPUs are another kind, which has no GPUs.
    known = {name for constant, name in vars(accelerators).items() if not constant.startswith(("_", "GOOGLE_TPU"))}
    if accelerator_type in known:
        return
    by_lower = {name.lower(): name for name in sorted(known)}
    meant = accelerator_type.lower()
    near = [name for name in by_lower if name in meant or meant in name] or get_close_matches(meant, by_lower)
    raise EngineError(
        f"accelerator_type {accelerator_type!r}: Ray {ray.__version__} has no such accelerator. "
        + (
            f"Is it {' or '.join(by_lower[name] for name in near)}?"
            if near
            else f"It knows {', '.join(sorted(known))}."
        )
    )
