"""An engine: what to deploy, whose it is, and how a deployed one is referred to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from airflow_provider_raylm.specs.base import JsonObject, Value
from airflow_provider_raylm.specs.media import Media
from airflow_provider_raylm.specs.runtime_env import RuntimeEnv

EngineTask = Literal["generate", "embed", "classify", "score"]
"""What an engine is loaded for."""


class Lease(Value):
    """How long an engine may outlive its use; its application deletes itself after either bound."""

    idle_timeout: float = Field(1800, gt=0, description="Seconds without a working task.")
    max_lifetime: float = Field(86_400, gt=0, description="Seconds since the deployment, busy or not.")


class EngineSpec(Value):
    """One named vLLM engine: what to load, on what, and how many.

    The engine's identity is everything but its waiting times and its lease: two specs that differ only there
    may share one engine.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$",
        description="Name of the engine, unique within the DAG.",
    )
    model: str = Field(min_length=1, description="Hugging Face id, path on the cluster, or s3://, gs:// URI.")
    served_model_name: str | None = Field(None, description="Name in requests and reports; default: the model.")
    tokenizer: str | None = Field(None, description="Tokenizer other than the model's own.")
    engine_kwargs: JsonObject = Field(
        default_factory=dict, description="vLLM engine arguments, by vLLM's own names (e.g. max_model_len)."
    )
    task: EngineTask = Field(
        "generate", description="What the engine is asked for: text, or what an encoder or reranker gives."
    )
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters by name: path on the cluster, URI, or Hugging Face id; Step.adapter chooses.",
    )
    media: Media = Field(Media(), description="Which images rows may name, beside those that they hold.")
    accelerator_type: str | None = Field(None, description="Ray's name of the accelerator, e.g. H100.")
    gpus_per_worker: float = Field(
        1, ge=0, description="GPU of each vLLM worker: 1, a fraction of a shared one, or 0 for CPUs."
    )
    num_cpus: float = Field(1, gt=0, description="CPUs of each replica's own process.")
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    replicas: int | tuple[int, int] = Field(1, description="Number of replicas, or (min, max) to autoscale.")
    max_ongoing_requests: int = Field(
        1024, ge=1, description="Handle calls one replica accepts at a time; a call carries a block of rows."
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the replicas.")
    secret_env: dict[str, str] = Field(
        default_factory=dict,
        description="Secret environment of the replicas: each variable's file on the cluster's nodes.",
    )
    runtime_env: RuntimeEnv = Field(
        RuntimeEnv(), description="What the engine's jobs and replicas find beside the cluster's image."
    )
    log_engine_metrics: bool = Field(
        False, description="Publish vLLM's metrics on Ray's Prometheus port; costs throughput (see performance)."
    )
    hang_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds without a sign of life after which a replica is replaced; default 90, on CPUs 360.",
    )
    deploy_timeout: float = Field(1800, gt=0, description="Seconds until the engine must be up.")
    scale_up_timeout: float = Field(
        30, ge=0, description="Seconds a cluster that is too small in total gets to grow before the deploy fails."
    )
    lease: Lease = Lease()

    old_names: ClassVar[Mapping[str, str]] = {
        "served_name": "served_model_name",
        "gpus": "gpus_per_worker",
        "cpus": "num_cpus",
    }
    not_identity: ClassVar[frozenset[str]] = frozenset({"deploy_timeout", "scale_up_timeout", "lease"})
    # Arguments of vLLM that say how fast, on what and how much at a time, not what is answered.
    _not_in_answers: ClassVar[frozenset[str]] = frozenset(
        {
            *("performance_mode", "max_num_seqs", "max_num_batched_tokens", "max_num_partial_prefills"),
            *("enable_chunked_prefill", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes"),
            *("block_size", "swap_space", "cpu_offload_gb", "enforce_eager", "compilation_config", "async_scheduling"),
            *("load_format", "download_dir", "max_parallel_loading_workers", "disable_log_stats", "scheduling_policy"),
        }
    )
    # What of vLLM's arguments a field decides, or Ray does, or nothing here would heed; and what to do instead.
    _own_arguments: ClassVar[dict[str, str]] = {
        "model": "set EngineSpec.model instead",
        "tokenizer": "set EngineSpec.tokenizer instead",
        "served_model_name": "set EngineSpec.served_model_name instead",
        "runner": "set EngineSpec.task instead",
        "task": "set EngineSpec.task instead",
        "enable_lora": "set EngineSpec.adapters instead",
        "tensor_parallel_size": "set EngineSpec.tensor_parallel_size instead",
        "pipeline_parallel_size": "set EngineSpec.pipeline_parallel_size instead",
        "prefill_context_parallel_size": "Ray reserves no GPUs for it; set EngineSpec.tensor_parallel_size instead",
        "data_parallel_*": "set EngineSpec.replicas instead",
        "distributed_executor_backend": "EngineSpec.gpus_per_worker decides: Ray's workers, or processes without GPUs",
        "allowed_media_domains": "set EngineSpec.media instead",
        "allowed_local_media_path": "set EngineSpec.media instead",
        "device_ids": "Ray chooses the GPUs; set EngineSpec.accelerator_type for a kind",
        "nnodes": "Ray chooses the nodes",
        "node_rank": "Ray chooses the nodes",
        "master_addr": "Ray chooses the nodes",
        "master_port": "Ray chooses the nodes",
        "max_num_queued_*": "it would refuse rows that can wait; set max_num_seqs for what an engine works on",
        "skip_tokenizer_init": "rows are text, which an engine without a tokenizer refuses",
        "hf_token": "set EngineSpec.secret_env's HF_TOKEN instead",
        **dict.fromkeys(
            (
                *("host", "port", "uds", "api_key", "root_path", "middleware", "ssl_*", "enable_ssl_refresh"),
                *("allow_credentials", "allowed_origins", "allowed_methods", "allowed_headers", "h11_*", "sse_*"),
                *("uvicorn_*", "disable_uvicorn_*", "disable_access_*", "disable_fastapi_docs", "enable_offline_docs"),
                *("enable_request_id_headers", "enable_server_load_tracking", "enable_tokenizer_info_endpoint"),
            ),
            "an engine has no HTTP endpoint",
        ),
    }
    _own_variables: ClassVar[dict[str, str]] = {
        "VLLM_RAY_PER_WORKER_GPUS": "set EngineSpec.gpus_per_worker instead",
        "VLLM_RAY_BUNDLE_INDICES": "Ray chooses the GPUs",
        "VLLM_DP_*": "set EngineSpec.replicas instead",
    }
    # Without GPUs, they hide those that a node has.
    _visible_gpus: ClassVar[dict[str, str]] = dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
        "Ray chooses the GPUs; set EngineSpec.accelerator_type for a kind",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse("engine_kwargs", self.engine_kwargs, self._own_arguments)
        around = self.runtime_env
        for field, variables in (
            *(("env", self.env), ("secret_env", self.secret_env)),
            *(("runtime_env.env_vars", around.env_vars), ("runtime_env.secret_env", around.secret_env)),
        ):
            _refuse(field, variables, self._own_variables | (self._visible_gpus if self.gpus_per_worker else {}))
        self._check_gpus()
        if self.adapters and self.task != "generate":
            raise ValueError(f"adapters: only for task='generate', got {self.task!r}")
        if self.effective_model_name in self.adapters:
            raise ValueError(f"adapters.{self.effective_model_name}: the model itself has this name")
        if self.log_engine_metrics and self.engine_kwargs.get("disable_log_stats"):
            raise ValueError("engine_kwargs.disable_log_stats: log_engine_metrics needs these statistics")
        twice = sorted(set(self.env) & set(self.secret_env))
        if twice:
            raise ValueError(f"secret_env.{twice[0]}: env sets it, too")
        if isinstance(self.replicas, tuple):
            low, high = self.replicas
            if not 1 <= low <= high:
                raise ValueError(f"replicas: (min, max) needs 1 <= min <= max, got {self.replicas}")
        elif self.replicas < 1:
            raise ValueError("replicas: at least 1")
        return self

    def _check_gpus(self) -> None:
        gpus = self.gpus_per_worker
        if gpus == 0 and self.accelerator_type:
            raise ValueError(f"accelerator_type {self.accelerator_type!r} needs a GPU, but gpus_per_worker is 0")
        if gpus > 1:
            raise ValueError(
                f"gpus_per_worker: at most 1, got {gpus:g}; for an engine on several GPUs set tensor_parallel_size or "
                "pipeline_parallel_size, for more engines replicas"
            )
        if 0 < gpus <= 0.5 and self.workers > 1:
            raise ValueError(
                f"gpus_per_worker: with {gpus:g}, Ray may put several of this engine's {self.workers} workers on one "
                "GPU, which NCCL refuses; ask for more than 0.5 (tensor_parallel_size, pipeline_parallel_size)"
            )
        memory = self.engine_kwargs.get("gpu_memory_utilization")
        if 0 < gpus < 1 and isinstance(memory, int | float) and memory > gpus:
            raise ValueError(
                f"engine_kwargs.gpu_memory_utilization: {memory:g} of a GPU's memory, but gpus_per_worker is {gpus:g}; "
                "the rest belongs to whoever shares the GPU"
            )

    @property
    def answers_from(self) -> dict[str, object]:
        """What an answer depends on; another number of replicas, environment or waiting time gives the same."""
        chosen = {name: value for name, value in self.engine_kwargs.items() if name not in self._not_in_answers}
        # What a later version added counts where it is used: else every earlier output would be another engine's.
        added = {name: value for name in ("task", "adapters") if (value := getattr(self, name)) not in ("generate", {})}
        return {"model": self.model, "tokenizer": self.tokenizer, "engine_kwargs": chosen, **added}

    @property
    def workers(self) -> int:
        """Number of vLLM workers of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def max_replicas(self) -> int:
        """Number of replicas, at most."""
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas

    @property
    def effective_model_name(self) -> str:
        """The model's name in requests and reports."""
        return self.served_model_name or self.model


def _refuse(field: str, given: Mapping[str, object], reasons: Mapping[str, str]) -> None:
    """Raise ValueError for the first name that one of the patterns fits."""
    for name in given:
        for pattern, instead in reasons.items():
            if fnmatchcase(name, pattern):
                raise ValueError(f"{field}.{name}: {instead}")


# Begins the id of the run in the labels of an engine that `raylm preview` or `estimate` has deployed.
COMMAND_RUN = "preview__"


class Labels(Value):
    """Who owns an engine: enough to find it again and never to take somebody else's."""

    installation: str = Field(description="The Airflow installation that deployed it.")
    dag_id: str
    run_id: str
    engine: str

    @property
    def of_a_command(self) -> bool:
        """Whether a command deployed it for itself: it ends with the command, and no run has it, or may use it."""
        return self.run_id.startswith(COMMAND_RUN)


class EngineRef(Value):
    """A deployed engine, as the deploy task hands it to the others."""

    application: str
    deployment: str
    model: str
    fingerprint: str
    answers: str = Field("", description="Fingerprint of what its answers depend on.")
    version: str = Field("", description="Version of this package that deployed it.")
    labels: Labels
    lease: Lease
    task: EngineTask = "generate"
    replicas: int = Field(1, description="Replicas of the engine, at most.")
    media: Media = Field(Media(), description="Which images rows may name.")
    gpus_per_replica: float = Field(0.0, description="GPUs that each replica holds.")
    vector_size: int = Field(0, description="Numbers of an embedding; 0 for an engine that does not embed.")
    runtime_env: RuntimeEnv = Field(RuntimeEnv(), description="Its own: the tasks on it get the same.")
    dashboard_url: str = ""
    adopted: bool = Field(False, description="True when it was already running.")
    ray_version: str = ""
    vllm_version: str = ""
    deploy_seconds: float = 0.0
    deployed_at: float = Field(0.0, description="Unix seconds at which its deployment began; 0 when it was adopted.")

    @property
    def gpus(self) -> float:
        """GPUs of the engine, at most."""
        return self.gpus_per_replica * self.replicas


class EngineQuery(Value):
    """Which engine is looked for: its name, and whose it is; None for anybody's."""

    installation: str
    dag_id: str | None = None
    run_id: str | None = None
    engine: str

    def latest(self, engines: Iterable[EngineRef]) -> EngineRef | None:
        """Return the engine that fits; of several, the one that was deployed last. A command's is nobody else's."""
        wanted = self.model_dump(exclude_none=True).items()
        fitting = (ref for ref in engines if wanted <= ref.labels.model_dump().items() and not ref.labels.of_a_command)
        return max(fitting, key=lambda ref: (ref.deployed_at, ref.labels.run_id), default=None)
