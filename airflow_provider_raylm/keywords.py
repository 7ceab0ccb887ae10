"""The keywords of ``shared_engine`` and ``engine.infer``, for editors and type checkers.

Made from the specs and the operators by ``python -m tests.keywords``; a test compares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, TypedDict

from airflow.sdk import ObjectStoragePath
from airflow.sdk.definitions._internal.mixins import ResolveMixin

from airflow_provider_raylm.specs import OnBusy

Later = str | ResolveMixin
"""What becomes a value when the task runs: a template, another task's output, a literal."""
Place = Later | os.PathLike[str] | ObjectStoragePath
"""A file, a folder or a glob: also as an asset or a path."""


class TaskArguments(TypedDict, total=False):
    """Of every task of this package, and of Airflow."""

    owner: str
    email: str | Sequence[str] | None
    email_on_retry: bool
    email_on_failure: bool
    retries: int | None
    retry_delay: timedelta | float
    retry_exponential_backoff: float
    max_retry_delay: timedelta | float | None
    retry_policy: Any
    start_date: datetime | None
    end_date: datetime | None
    depends_on_past: bool
    ignore_first_depends_on_past: bool
    wait_for_past_depends_before_skipping: bool
    wait_for_downstream: bool
    dag: Any
    params: Any
    priority_weight: int
    weight_rule: Any
    queue: str
    pool: str | None
    pool_slots: int
    sla: timedelta | None
    execution_timeout: timedelta | None
    on_execute_callback: Any
    on_failure_callback: Any
    on_success_callback: Any
    on_retry_callback: Any
    on_skipped_callback: Any
    pre_execute: Any
    post_execute: Any
    trigger_rule: str
    resources: dict[str, Any] | None
    run_as_user: str | None
    map_index_template: str | None
    max_active_tis_per_dag: int | None
    max_active_tis_per_dagrun: int | None
    executor: str | None
    executor_config: Any
    do_xcom_push: bool
    multiple_outputs: bool
    inlets: Any | None
    outlets: Any | None
    task_group: Any
    doc: str | None
    doc_md: str | None
    doc_json: str | None
    doc_yaml: str | None
    doc_rst: str | None
    task_display_name: str | None
    logger_name: str | None
    allow_nested_operators: bool
    render_template_as_native_obj: bool | None
    raylm_conn_id: str | None
    poll_interval: float
    pending_timeout: float
    deferrable: bool


class DeployArguments(TaskArguments, total=False):
    """Of the deploy task."""


class TeardownArguments(TaskArguments, total=False):
    """Of the teardown task."""

    on_busy: OnBusy
    drain_timeout: float


class EngineFields(TypedDict, total=False):
    """EngineSpec's fields, without the name."""

    model: Later
    served_model_name: Later | None
    tokenizer: Later | None
    engine_kwargs: Mapping[str, Any] | Later
    task: Literal["generate", "embed", "classify", "score"] | Later
    adapters: Mapping[str, Any] | Later
    media: Mapping[str, Any] | Later
    accelerator_type: Later | None
    gpus_per_worker: float | Later
    num_cpus: float | Later
    tensor_parallel_size: int | Later
    pipeline_parallel_size: int | Later
    replicas: int | tuple[int | Later, int | Later] | Sequence[Any] | Later
    max_ongoing_requests: int | Later
    env: Mapping[str, Any] | Later
    secret_env: Mapping[str, Any] | Later
    runtime_env: Mapping[str, Any] | Later
    log_engine_metrics: bool | Later
    hang_timeout: float | Later | None
    deploy_timeout: float | Later
    scale_up_timeout: float | Later
    lease: Mapping[str, Any] | Later


class BatchFields(TypedDict, total=False):
    """BatchSpec's fields."""

    prompt: Later | None
    messages: Sequence[Mapping[str, Any] | Later] | Later | None
    embed: Later | None
    classify: Later | None
    score: tuple[Later, Later] | Sequence[Any] | Later | None
    output_column: Later
    max_tokens: int | Later
    temperature: float | Later | None
    top_p: float | Later | None
    top_k: int | Later | None
    min_p: float | Later | None
    seed: int | Later | None
    stop: Sequence[Later] | Later | None
    presence_penalty: float | Later | None
    frequency_penalty: float | Later | None
    repetition_penalty: float | Later | None
    ignore_eos: bool | Later | None
    adapter: Later | None
    n: int | Later
    output_schema: Mapping[str, Any] | Later | None
    choice: Sequence[Later] | Later | None
    regex: Later | None
    grammar: Later | None
    reasks: int | Later
    on_length: Literal["write", "fail"] | Later
    truncate_prompt_tokens: int | Later | None
    truncation_side: Literal["left", "right"] | Later | None
    keep: Sequence[Literal["reasoning", "tool_calls", "logprobs", "token_ids", "prompt_token_ids"] | Later] | Later
    dimensions: int | Later | None
    normalize: bool | Later | None
    vector_type: Literal["float32", "float16"] | Later
    probabilities: bool | Later
    extra_body: Mapping[str, Any] | Later
    source: Place | Sequence[Place] | Mapping[str, Any]
    source_format: Literal["parquet", "jsonl", "csv", "text"] | Later | None
    delimiter: Later | None
    escape: Later | None
    encoding: Later
    limit: int | Later | None
    columns: Sequence[Later] | Later | None
    id_column: Later | None
    steps: Sequence[Mapping[str, Any] | Later] | Later
    preprocess: Later | None
    postprocess: Later | None
    output: Place
    output_format: Literal["parquet", "jsonl"] | Later
    overwrite: bool | Later
    quarantine: Later | None
    max_failed_fraction: float | Later
    block_rows: int | Later
    in_flight_rows: int | Later | None
    request_timeout: float | Later | None
    engine_timeout: float | Later
    max_tokens_total: int | Later | None
    max_cost: float | Later | None
    deduplicate: bool | Later
    prompt_file: Later | None


class InferenceArguments(TaskArguments, total=False):
    """Of an inference task, apart from BatchSpec's fields."""

    runtime_env: Any
    storage_conn_id: str | Sequence[str] | None
    storage_options: Any
    redeploy: Mapping[str, Any] | Later | None


class InferArguments(BatchFields, InferenceArguments, total=False):
    """Of ``engine.infer``."""


class DecoratedArguments(InferenceArguments, total=False):
    """Of ``@engine.task``."""

    task_id: str
    batch: BatchFields
    render_returned: bool
