"""From a spec to Ray's own configuration of an LLM deployment."""

from __future__ import annotations

from typing import Any

import ray

from airflow_provider_raylm.cluster.window import LEAST_BLOCKS_IN_FLIGHT
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.naming import ENGINE_DEPLOYMENT
from airflow_provider_raylm.specs import EngineSpec


def llm_config(spec: EngineSpec) -> Any:
    """Translate a spec into Ray's LLMConfig; nothing is started.

    Raises:
        EngineError: the cluster lacks ray[llm]'s or vLLM's packages.
    """
    try:
        from ray.serve.llm import LLMConfig
    except ImportError as error:
        raise EngineError(_missing_package(error)) from error

    replicas: dict[str, Any] = {"num_replicas": spec.replicas}
    if isinstance(spec.replicas, tuple):
        low, high = spec.replicas
        # In blocks; Ray's default for engines would never start a second replica.
        scaling = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": LEAST_BLOCKS_IN_FLIGHT}
        replicas = {"autoscaling_config": scaling}
    on_a_path = {"callback_config": {"callback_class": f"{__package__}.server.NothingToDownload"}}
    # Ray adds the replica's own CPUs to the first of these bundles.
    placement = {"bundle_per_worker": {"GPU": spec.gpus}} if spec.gpus else {"bundles": [{"CPU": 0}]}
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
        placement_group_config=placement,
        deployment_config={
            "max_ongoing_requests": spec.max_ongoing_requests,
            "ray_actor_options": {"num_cpus": spec.cpus},
            # A start that failed fails again; the task's own retry is the place to try once more.
            "max_constructor_retry_count": 1,
            # A replica that computes on the CPU answers late when the machine is busy; that is not ill health.
            "health_check_period_s": 10 if spec.gpus else 30,
            "health_check_timeout_s": 30 if spec.gpus else 120,
            "graceful_shutdown_timeout_s": 20,
            **replicas,
        },
        runtime_env={"env_vars": dict(spec.env)},
        **(on_a_path if spec.model.startswith("/") else {}),
        log_engine_metrics=spec.log_engine_metrics,
    )


def llm_deployment(spec: EngineSpec) -> Any:
    """Return the engine as a Serve application that is not deployed yet.

    Raises:
        EngineError: the cluster lacks a package, or Ray or vLLM refuses an argument.
    """
    config = llm_config(spec)
    try:
        from ray.serve.llm import build_llm_deployment

        from airflow_provider_raylm.cluster.server import BlockLLMServer

        return build_llm_deployment(
            config, deployment_cls=BlockLLMServer, override_serve_options={"name": ENGINE_DEPLOYMENT}
        )
    except ImportError as error:
        raise EngineError(_missing_package(error)) from error
    except ValueError as error:
        raise EngineError(f"The engine cannot be built: {error}") from error


def _missing_package(error: ImportError) -> str:
    return (
        f"The cluster's Python lacks a package ({error}). Its image needs ray[data,serve], vllm at the version that "
        f"Ray {ray.__version__} pins, and jsonref (see the installation page)."
    )
