"""An engine: what to deploy, whose it is, and how a deployed one is referred to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self

from pydantic import Field, model_validator

from airflow_provider_raylm.specs.base import JsonObject, Value


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
    served_name: str | None = Field(None, description="Name in requests and reports; default: the model.")
    tokenizer: str | None = Field(None, description="Tokenizer other than the model's own.")
    engine_kwargs: JsonObject = Field(
        default_factory=dict, description="vLLM engine arguments, by vLLM's own names (e.g. max_model_len)."
    )
    accelerator_type: str | None = Field(None, description="Ray's name of the accelerator, e.g. H100.")
    gpus: float = Field(1, ge=0, description="GPUs per vLLM worker; a fraction shares a GPU; 0 means CPU.")
    cpus: float = Field(1, gt=0, description="CPUs of each replica's own process.")
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
    _own_arguments: ClassVar[dict[str, str]] = {
        "model": "model",
        "tokenizer": "tokenizer",
        "served_model_name": "served_name",
        "tensor_parallel_size": "tensor_parallel_size",
        "pipeline_parallel_size": "pipeline_parallel_size",
    }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for argument, field in self._own_arguments.items():
            if argument in self.engine_kwargs:
                raise ValueError(f"engine_kwargs.{argument}: set EngineSpec.{field} instead")
        twice = sorted(set(self.env) & set(self.secret_env))
        if twice:
            raise ValueError(f"secret_env.{twice[0]}: env sets it, too")
        if self.gpus == 0 and self.accelerator_type:
            raise ValueError(f"accelerator_type {self.accelerator_type!r} needs a GPU, but gpus is 0")
        if isinstance(self.replicas, tuple):
            low, high = self.replicas
            if not 1 <= low <= high:
                raise ValueError(f"replicas: (min, max) needs 1 <= min <= max, got {self.replicas}")
        elif self.replicas < 1:
            raise ValueError("replicas: at least 1")
        return self

    @property
    def answers_from(self) -> dict[str, object]:
        """What an answer depends on; another number of replicas, environment or waiting time gives the same."""
        chosen = {name: value for name, value in self.engine_kwargs.items() if name not in self._not_in_answers}
        return {"model": self.model, "tokenizer": self.tokenizer, "engine_kwargs": chosen}

    @property
    def max_replicas(self) -> int:
        """Number of replicas, at most."""
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas

    @property
    def served_model_name(self) -> str:
        """The model's name in requests and reports."""
        return self.served_name or self.model


class Labels(Value):
    """Who owns an engine: enough to find it again and never to take somebody else's."""

    installation: str = Field(description="The Airflow installation that deployed it.")
    dag_id: str
    run_id: str
    engine: str


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
    replicas: int = Field(1, description="Replicas of the engine, at most.")
    dashboard_url: str = ""
    adopted: bool = Field(False, description="True when it was already running.")
    ray_version: str = ""
    vllm_version: str = ""
    deploy_seconds: float = 0.0


class EngineQuery(Value):
    """Which engine is looked for: its name, and whose it is; None for anybody's."""

    installation: str
    dag_id: str | None = None
    run_id: str | None = None
    engine: str

    def latest(self, engines: Iterable[EngineRef]) -> EngineRef | None:
        """Return the engine that fits; of several, the one whose run id comes last in the alphabet."""
        wanted = self.model_dump(exclude_none=True).items()
        fitting = (ref for ref in engines if wanted <= ref.labels.model_dump().items())
        return max(fitting, key=lambda ref: ref.labels.run_id, default=None)
