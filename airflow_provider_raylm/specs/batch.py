"""An inference task: which rows, what to ask of each, where the answers go."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from airflow_provider_raylm.specs.base import RESERVED_PREFIX, JsonObject, Value
from airflow_provider_raylm.specs.reports import BatchReport

Format = Literal["parquet", "jsonl", "csv", "text"]
OutputFormat = Literal["parquet", "jsonl"]

PLACEHOLDER = re.compile(r"\$\$\{|\$\{([^{}]+)\}")
"""``$${`` stands for ``${``, ``${column}`` for a row's value."""


def placeholders(template: str) -> list[str]:
    """Return the column names in *template*, in order of appearance."""
    return [match.group(1) for match in PLACEHOLDER.finditer(template) if match.group(1)]


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


def is_hidden(path: str) -> bool:
    """Return whether a part of *path* begins with ``_`` or ``.``, which readers of a folder leave out."""
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def _output_of_report(source: object) -> object:
    """Let the report of an earlier task stand for the place where it wrote."""
    if isinstance(source, BatchReport):
        return source.output
    if isinstance(source, dict) and "output" in source:
        return source["output"]
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [_output_of_report(one) for one in source]
    return source


def _folder(uri: str) -> str:
    """Return a folder's address as it is written without a slash at its end."""
    return uri.rstrip("/") or uri


class BatchSpec(Step):
    """One inference task: which rows, what to ask, where the answers go.

    Either ``prompt`` or ``messages`` for one question per row, or ``steps`` for several: they run in one
    pipeline on the same engine, and each step sees the columns that the earlier ones produced.
    """

    source: Annotated[str | tuple[str, ...], BeforeValidator(_output_of_report)] = Field(
        description="File, folder or glob (or several), or the report of an earlier task."
    )
    source_format: Format | None = Field(None, description="Default: by the files' suffix.")
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="Between the cells of CSV; default: a comma, in .tsv a tab."
    )
    encoding: str = Field("utf-8", description="Of CSV, JSON Lines and text, by Python's names; a BOM is left out.")
    limit: int | None = Field(None, ge=1, description="Only the first rows of the source, for a trial.")
    columns: tuple[str, ...] | None = Field(None, description="Input columns to keep; default: all.")
    id_column: str | None = Field(
        None, description="Column with a unique id per row; default: file and position, or an earlier task's id."
    )
    steps: tuple[Step, ...] = Field((), description="Several questions per row, in order.")
    preprocess: str | None = Field(None, description="package.module:function, row -> row, before the prompt.")
    postprocess: str | None = Field(None, description="package.module:function, row -> row, after the answer.")
    output: Annotated[str, AfterValidator(_folder)] = Field(
        min_length=1, description="Folder that receives the answers."
    )
    output_format: OutputFormat = "parquet"
    overwrite: bool = Field(False, description="Replace the output of another spec or input instead of failing.")
    quarantine: Annotated[str, AfterValidator(_folder)] | None = Field(
        None, description="Folder of failed rows; default: _quarantine in output."
    )
    error_budget: float = Field(0.05, ge=0, le=1, description="Share of the rows that may fail.")
    block_rows: int = Field(256, ge=1, description="Rows per block: sent, answered and written together.")
    in_flight_rows: int | None = Field(
        None,
        ge=1,
        description="Rows on their way at a time, rounded up to blocks; default: twice what the engine works on.",
    )
    request_timeout: float | None = Field(
        None, gt=0, description="Seconds that a row may be in the engine; default: for as long as it gets tokens."
    )
    engine_timeout: float = Field(900, gt=0, description="Seconds that a failed engine may take to be back.")
    deduplicate: bool = Field(
        False, description="Ask rows with the same question once; needs temperature 0, where the answers are the same."
    )

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            "output",
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
        self._check_places()
        self._check_reading()
        return self

    def _check_places(self) -> None:
        if self.quarantine_uri == self.output:
            raise ValueError(f"quarantine: {self.output!r} is the output, too; failed rows need a folder of their own")
        for place in ("output", "quarantine_uri"):
            uri = getattr(self, place)
            for source in map(_folder, self.sources):
                if uri == source or (uri.startswith(f"{source}/") and not is_hidden(uri.removeprefix(source))):
                    raise ValueError(
                        f"{place.removesuffix('_uri')}: {uri!r} lies in the source {source!r}, so that a retry would "
                        "read its own answers; choose a folder outside"
                    )

    def _check_reading(self) -> None:
        if self.delimiter is not None and self.source_format not in (None, "csv"):
            raise ValueError(f"delimiter: only CSV has one, and source_format is {self.source_format!r}")
        if self.delimiter is not None and self.delimiter in '"\r\n':
            raise ValueError(f"delimiter: {self.delimiter!r} has a meaning of its own in CSV")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding: Python knows none of the name {self.encoding!r}") from None
        if codecs.lookup(self.encoding).name != "utf-8" and self.source_format == "parquet":
            raise ValueError("encoding: a Parquet file tells its own")

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
        return self.quarantine or f"{self.output}/_quarantine"
