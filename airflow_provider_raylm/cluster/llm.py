"""From a spec to Ray's own LLM deployment, in two halves: what the driver deploys and what the replica loads.

Ray's ``build_llm_deployment`` does both at once and imports vLLM for it: ten seconds and more in a driver that has no
other use for it. Here the driver says what a replica asks of the cluster, and the replica makes Ray's ``LLMConfig``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import ray
from ray import serve

from airflow_provider_raylm.cluster.batch.window import LEAST_BLOCKS_IN_FLIGHT
from airflow_provider_raylm.cluster.resources import bundles
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
# Serve imports it in the replica.
_SERVER = f"{__package__}.server.BlockLLMServer"


def llm_deployment(spec: EngineSpec) -> Any:
    """Return the engine as a Serve application that is not deployed yet.

    Raises:
        EngineError: the cluster lacks vLLM, or what Ray's part for it needs.
    """
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
        scaling = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": LEAST_BLOCKS_IN_FLIGHT}
        replicas = {"autoscaling_config": scaling}
    # The job's, so that the replica finds this package; but not its variables, which carry the request.
    runtime_env = {**ray.get_runtime_context().runtime_env, "env_vars": dict(spec.env)}
    deployment = serve.deployment(
        name=ENGINE_DEPLOYMENT,
        max_ongoing_requests=spec.max_ongoing_requests,
        ray_actor_options={"num_cpus": spec.cpus, "runtime_env": runtime_env},
        placement_group_bundles=bundles(spec),
        placement_group_strategy=PLACEMENT,
        # A start that failed fails again; the task's own retry is the place to try once more.
        max_constructor_retry_count=1,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # Serve gives a replica up after three checks without an answer.
        health_check_timeout_s=(spec.hang_timeout or _HANG_TIMEOUT_S[spec.gpus > 0]) / 3,
        graceful_shutdown_timeout_s=20,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        **replicas,
    )
    return deployment(_SERVER).bind(spec.model_dump(mode="json"))


def llm_config(spec: EngineSpec) -> Any:
    """Translate a spec into Ray's LLMConfig; imports vLLM, starts nothing.

    Raises:
        ValueError: Ray or vLLM refuses an argument.
    """
    from ray.serve.llm import LLMConfig

    at_start = {"secret_env": dict(spec.secret_env), "download": not spec.model.startswith("/")}
    return LLMConfig(
        model_loading_config={
            "model_id": spec.served_model_name,
            "model_source": spec.model,
            **({"tokenizer_source": spec.tokenizer} if spec.tokenizer else {}),
        },
        engine_kwargs={
            # Ray starts every engine with vLLM's sizes for an API server; this one only does batch work.
            "performance_mode": "throughput",
            "disable_log_stats": not spec.log_engine_metrics,
            **spec.engine_kwargs,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "pipeline_parallel_size": spec.pipeline_parallel_size,
            **({"tokenizer": spec.tokenizer} if spec.tokenizer else {}),
        },
        accelerator_type=spec.accelerator_type,
        accelerator_config={"kind": "gpu" if spec.gpus else "cpu"},
        # The replica's own CPUs are in the first of these bundles, too: resources.bundles says all.
        placement_group_config={"bundle_per_worker": {"GPU": spec.gpus}} if spec.gpus else {"bundles": [{"CPU": 0}]},
        deployment_config={"ray_actor_options": {"num_cpus": spec.cpus}},
        callback_config={"callback_class": f"{__package__}.server.NodeStart", "callback_kwargs": at_start},
        log_engine_metrics=spec.log_engine_metrics,
    )
