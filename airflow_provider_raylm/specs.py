"""The values that cross every border: what to deploy, what to run, and what came of it.

All defaults and all validation of the public API live here. Every spec is frozen, refuses unknown fields, and is
plain JSON on the wire, so that the worker, the cluster and a unit test see the same thing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from airflow_provider_raylm.cluster.rows import placeholders
from airflow_provider_raylm.errors import BatchError, SpecError

Format = Literal["parquet", "jsonl", "csv", "text"]
OutputFormat = Literal["parquet", "jsonl"]

RESERVED_PREFIX = "raylm_"
"""Columns with this prefix are written by the provider: row id, token counts, finish reason, failure."""


class Value(BaseModel):
    """A frozen value that refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


SpecT = TypeVar("SpecT", bound=Value)


def build(spec: type[SpecT], value: object) -> SpecT:
    """Return *value* (a spec already, or a mapping) as *spec*.

    Raises:
        SpecError: a field is unknown, missing or bad; every one is named with its reason.
    """
    if isinstance(value, spec):
        return value
    try:
        return spec.model_validate(value)
    except ValidationError as error:
        raise SpecError(_explain(spec, error.errors())) from None


def check_unrendered(spec: type[Value], value: object, is_deferred: Any) -> None:
    """Check, when the DAG is parsed, whatever of *value* is known by then.

    ``is_deferred(field_value)`` says which top-level fields Airflow fills in later (a Jinja template, another
    task's output); those are left out, and a rule that spans fields is only applied when every field is known.

    Raises:
        SpecError: a known field is bad, or a field is unknown.
    """
    if is_deferred(value) or isinstance(value, spec):
        return
    if not isinstance(value, dict):
        raise SpecError(f"{spec.__name__}: expected a {spec.__name__} or a dict, got {type(value).__name__}")
    deferred = {field for field, content in value.items() if is_deferred(content)}
    try:
        spec.model_validate({field: content for field, content in value.items() if field not in deferred})
    except ValidationError as error:
        left = [e for e in error.errors() if not deferred or (e["loc"] and e["loc"][0] not in deferred)]
        if left:
            raise SpecError(_explain(spec, left)) from None
    unknown = deferred - set(spec.model_fields)
    if unknown:
        raise SpecError(f"{spec.__name__}.{sorted(unknown)[0]}: unknown field; known are {_known(spec)}")


def _explain(spec: type[Value], errors: list[Any]) -> str:
    lines = []
    for error in errors:
        where = ".".join([spec.__name__, *(str(part) for part in error["loc"])])
        reason = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            reason = f"unknown field; known are {_known(spec)}" if len(error["loc"]) == 1 else "unknown field"
        lines.append(f"{where}: {reason}")
    return "\n".join(lines)


def _known(spec: type[Value]) -> str:
    return ", ".join(spec.model_fields)


class Lease(Value):
    """How long an engine may outlive its use; its application deletes itself after either bound."""

    idle_timeout: float = Field(1800, gt=0, description="Seconds without a working task.")
    max_lifetime: float = Field(86_400, gt=0, description="Seconds since the deployment, busy or not.")


def _from_json_text(value: object) -> object:
    """Read JSON text: what a Jinja template makes of a mapping (``{{ params.engine_kwargs | tojson }}``)."""
    return json.loads(value) if isinstance(value, str) else value


JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_from_json_text)]


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
    def max_replicas(self) -> int:
        """Number of replicas, at most."""
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas

    @property
    def served_model_name(self) -> str:
        """The model's name in requests and reports."""
        return self.served_name or self.model


class Step(Value):
    """One question to the model per row: a prompt (completion) or messages (chat), and how to sample.

    ``${column}`` in a template stands for the row's value of that column; ``$${`` is a literal ``${``; a ``$``
    without a brace is text. A value left out is the model's own default, as vLLM serves it.
    """

    prompt: str | None = Field(None, description="Template of a completion request.")
    messages: tuple[dict[str, str], ...] | None = Field(
        None, description="Templates of a chat request: dicts with role and content."
    )
    output_column: str = Field("response", min_length=1, description="Column that receives the answer's text.")
    max_tokens: int = Field(256, ge=1, description="New tokens per row, at most.")
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    ignore_eos: bool | None = None
    extra_body: JsonObject = Field(
        default_factory=dict,
        description="Further fields of vLLM's OpenAI request, e.g. response_format or chat_template_kwargs.",
    )

    _sampling: ClassVar[tuple[str, ...]] = (
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "ignore_eos",
    )
    # One row gets one answer, in one piece, to the question that the template asks.
    _not_in_extra_body: ClassVar[frozenset[str]] = frozenset(
        {
            *(*_sampling, "model", "prompt", "messages", "stream", "n", "best_of", "echo", "request_id", "session_id"),
            *("max_completion_tokens", "use_beam_search"),
        }
    )

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        for message in self.messages or ():
            if set(message) != {"role", "content"}:
                raise ValueError(f"messages: each needs role and content, got {sorted(message)}")
        refused = sorted(self._not_in_extra_body & set(self.extra_body))
        if refused:
            raise ValueError(f"extra_body.{refused[0]}: not accepted here")
        if self.output_column.startswith(RESERVED_PREFIX):
            raise ValueError(f"output_column: the prefix {RESERVED_PREFIX!r} is reserved")
        return self

    @property
    def request_fields(self) -> dict[str, JsonValue]:
        """The fields of the OpenAI request that are the same for every row."""
        chosen = self.model_dump(mode="json", include=set(self._sampling), exclude_none=True)
        return {**chosen, **self.extra_body}

    @property
    def columns_used(self) -> frozenset[str]:
        """Names of the columns that the templates refer to."""
        templates = [self.prompt] if self.prompt is not None else [m["content"] for m in self.messages or ()]
        return frozenset(name for template in templates for name in placeholders(template))


_SUFFIXES: dict[str, Format] = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "txt": "text",
}


def _output_of_report(source: object) -> object:
    """Let the report of an earlier task stand for the place where it wrote."""
    if isinstance(source, BatchReport):
        return source.output
    if isinstance(source, dict) and "output" in source:
        return source["output"]
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [_output_of_report(one) for one in source]
    return source


class BatchSpec(Step):
    """One inference task: which rows, what to ask, where the answers go.

    Either ``prompt`` or ``messages`` for one question per row, or ``steps`` for several: they run in one
    pipeline on the same engine, and each step sees the columns that the earlier ones produced.
    """

    source: Annotated[str | tuple[str, ...], BeforeValidator(_output_of_report)] = Field(
        description="File, folder or glob (or several), or the report of an earlier task."
    )
    source_format: Format | None = Field(None, description="Default: by the files' suffix.")
    columns: tuple[str, ...] | None = Field(None, description="Input columns to keep; default: all.")
    id_column: str | None = Field(
        None, description="Column with a unique id per row; default: file and position, or an earlier task's id."
    )
    steps: tuple[Step, ...] = Field((), description="Several questions per row, in order.")
    preprocess: str | None = Field(None, description="package.module:function, row -> row, before the prompt.")
    postprocess: str | None = Field(None, description="package.module:function, row -> row, after the answer.")
    output: str = Field(min_length=1, description="Folder that receives the answers.")
    output_format: OutputFormat = "parquet"
    overwrite: bool = Field(False, description="Replace the output of another spec or input instead of failing.")
    quarantine: str | None = Field(None, description="Folder of failed rows; default: _quarantine in output.")
    error_budget: float = Field(0.05, ge=0, le=1, description="Share of the rows that may fail.")
    block_rows: int = Field(256, ge=1, description="Rows per block: sent, answered and written together.")
    in_flight_rows: int | None = Field(
        None,
        ge=1,
        description="Rows on their way at a time, rounded up to blocks; default: twice what the engine works on.",
    )
    request_timeout: float = Field(600, gt=0, description="Seconds per row in the engine; then it fails.")
    engine_timeout: float = Field(900, gt=0, description="Seconds that a failed engine may take to be back.")
    deduplicate: bool = Field(
        False, description="Ask rows with the same question once; needs temperature 0, where the answers are the same."
    )

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            "overwrite",
            "error_budget",
            "block_rows",
            "in_flight_rows",
            "request_timeout",
            "engine_timeout",
            "deduplicate",
        }
    )

    @model_validator(mode="after")
    def _one_question_per_step(self) -> Self:
        if [self.prompt is not None, self.messages is not None, bool(self.steps)].count(True) != 1:
            raise ValueError("give exactly one of prompt, messages and steps")
        produced: set[str] = set()
        for step in self.all_steps:
            if (step.prompt is None) == (step.messages is None):
                raise ValueError("steps: each needs exactly one of prompt and messages")
            if step.output_column in produced:
                raise ValueError(f"steps: output_column {step.output_column!r} appears twice")
            produced.add(step.output_column)
        if self.deduplicate and any(step.temperature != 0 for step in self.all_steps):
            raise ValueError("deduplicate: needs temperature 0 in every step; sampled answers differ from row to row")
        for field in ("preprocess", "postprocess"):
            path = getattr(self, field)
            if path is not None and not re.fullmatch(r"[\w.]+:\w+", path):
                raise ValueError(f"{field}: expected package.module:function, got {path!r}")
        if not self.sources:
            raise ValueError("source: at least one file, folder or glob")
        return self

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The questions in order; the spec itself when it asks only one."""
        return self.steps or (self,)

    @property
    def sources(self) -> tuple[str, ...]:
        """The source as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def quarantine_uri(self) -> str:
        """Folder of the failed rows."""
        return self.quarantine or f"{self.output.rstrip('/')}/_quarantine"

    def format_of(self, path: str) -> Format:
        """Return the format of one input file.

        Raises:
            BatchError: the suffix is unknown and ``source_format`` does not say.
        """
        if self.source_format is not None:
            return self.source_format
        suffix = path.removesuffix(".gz").rpartition(".")[2].lower()
        if suffix not in _SUFFIXES:
            raise BatchError(f"{path}: unknown suffix; set source_format to one of parquet, jsonl, csv, text")
        return _SUFFIXES[suffix]


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


class BatchReport(Value):
    """What became of the rows of one task. Its counts reconcile, or it cannot be built."""

    rows_in: int = Field(ge=0)
    rows_written: int = Field(ge=0)
    rows_quarantined: int = Field(ge=0)
    rows_already_done: int = Field(0, ge=0)
    failures: dict[str, int] = Field(default_factory=dict, description="Quarantined rows by reason.")
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    source: tuple[str, ...] = Field((), description="Where the rows came from, as the task was told.")
    output: str
    quarantine: str
    application: str
    model: str
    fingerprint: str

    @model_validator(mode="after")
    def _reconciles(self) -> Self:
        accounted = self.rows_written + self.rows_quarantined + self.rows_already_done
        if accounted != self.rows_in:
            raise ValueError(
                f"{self.rows_in} rows in, but {self.rows_written} written + {self.rows_quarantined} quarantined"
                f" + {self.rows_already_done} already done = {accounted}"
            )
        if sum(self.failures.values()) != self.rows_quarantined:
            raise ValueError(f"{self.rows_quarantined} quarantined rows, but reasons for {self.failures}")
        return self

    @property
    def rows_per_s(self) -> float:
        """Answered rows per second of this run, start-up included."""
        return (self.rows_written + self.rows_quarantined) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of this run, start-up included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


class EngineUsage(Value):
    """What an engine did in its life, summed over the tasks that used it."""

    tasks: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, report: BatchReport) -> EngineUsage:
        """Return this usage with one more task's report added."""
        return EngineUsage(
            tasks=self.tasks + 1,
            requests=self.requests + report.rows_written + report.rows_quarantined,
            prompt_tokens=self.prompt_tokens + report.prompt_tokens,
            completion_tokens=self.completion_tokens + report.completion_tokens,
        )


class EngineSeconds(Value):
    """Whom an engine's time went to. Tasks that work at the same time share it equally."""

    loading: float = Field(0.0, description="Seconds until it could take work.")
    idle: float = Field(0.0, description="Seconds in which no task worked.")
    tasks: dict[str, float] = Field(default_factory=dict, description="Seconds by the output of the task.")


class EngineInfo(Value):
    """An engine of this provider as found on the cluster."""

    application: str
    status: str
    fingerprint: str
    labels: Labels
    age_seconds: float
    working: tuple[str, ...] = Field((), description="Outputs of the tasks that are at work on it.")
    usage: EngineUsage = Field(default_factory=EngineUsage)
    spent: EngineSeconds = Field(default_factory=EngineSeconds)


OnBusy = Literal["wait", "fail", "delete"]
"""What a teardown does while tasks work on the engine: wait for them, fail, or delete it under them."""


class TeardownReport(Value):
    """What a teardown found and left."""

    application: str
    existed: bool
    engine_seconds: float = 0.0
    usage: EngineUsage = Field(default_factory=EngineUsage)
    spent: EngineSeconds = Field(default_factory=EngineSeconds)
    resources_free: bool = Field(description="True when what the engine held is available again.")


class SweepReport(Value):
    """The engines of this provider on a cluster, and those of them that were deleted."""

    engines: tuple[EngineInfo, ...]
    deleted: tuple[str, ...] = ()
