"""An inference task: which rows, what to ask of each, where the answers go."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs.engine import EngineTask
from airflow_provider_raylm.specs.reports import BatchReport
from airflow_provider_raylm.specs.step import Step, require_kind

_HOUR_S = 3600.0

Format = Literal["parquet", "jsonl", "csv", "text"]
OutputFormat = Literal["parquet", "jsonl"]
CSV_OPTIONS = ("delimiter", "escape")


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

    Either the fields of a ``Step`` for one question per row, or ``steps`` for several: they run in one pipeline on the
    same engine, and each step sees the columns that the earlier ones produced.
    """

    source: Annotated[str | tuple[str, ...], BeforeValidator(_output_of_report)] = Field(
        description="File, folder or glob (or several), or the report of an earlier task."
    )
    source_format: Format | None = Field(None, description="Default: by the files' suffix.")
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="Between the cells of CSV; default: a comma, in .tsv a tab."
    )
    escape: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Before a quote within quotes in CSV, a backslash as Spark writes it; default: quotes are doubled.",
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
    max_failed_fraction: float = Field(0.05, ge=0, le=1, description="Share of the rows that may fail.")
    block_rows: int = Field(256, ge=1, description="Rows per block: sent, answered and written together.")
    in_flight_rows: int | None = Field(
        None,
        ge=1,
        description="Rows in flight at a time, rounded up to blocks; default: twice what the engine works on.",
    )
    request_timeout: float | None = Field(
        None, gt=0, description="Seconds that a row may be in the engine; default: for as long as it gets tokens."
    )
    engine_timeout: float = Field(900, gt=0, description="Seconds that a failed engine may take to be back.")
    max_tokens_total: int | None = Field(
        None, ge=1, description="Tokens of prompts and answers that an attempt may spend; then it stops in good order."
    )
    max_cost: float | None = Field(
        None, gt=0, description="What an attempt may cost, in the currency of the connection's price_per_gpu_hour."
    )
    deduplicate: bool = Field(
        False, description="Ask rows with the same question once; needs temperature 0, where the answers are the same."
    )

    old_names: ClassVar[Mapping[str, str]] = {"error_budget": "max_failed_fraction"}
    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            "output",
            "overwrite",
            "max_failed_fraction",
            "block_rows",
            "in_flight_rows",
            "request_timeout",
            "engine_timeout",
            "max_tokens_total",
            "max_cost",
            "deduplicate",
        }
    )

    @model_validator(mode="after")
    def _one_question_per_step(self) -> Self:
        if len(self._asked) + bool(self.steps) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.kinds)} and steps")
        self._check_steps()
        if self.deduplicate and not all(step.is_determined for step in self.all_steps):
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

    def _check_steps(self) -> None:
        beside = [name for name in Step.model_fields if self.differs(name)] if self.steps else []
        if beside:
            raise ValueError(f"{beside[0]}: has no effect beside steps; give it to each step that it is for")
        produced: set[str] = set()
        for step in self.all_steps:
            if len(step._asked) != 1:
                raise ValueError(f"steps: each needs exactly one of {', '.join(self.kinds)}")
            for column in step.output_columns:
                if column in produced:
                    raise ValueError(f"steps: output_column {column!r} appears twice")
                produced.add(column)

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
        for name in CSV_OPTIONS:
            character = getattr(self, name)
            if character is not None and self.source_format not in (None, "csv"):
                raise ValueError(f"{name}: only CSV has one, and source_format is {self.source_format!r}")
            if character is not None and (character in '"\r\n' or not character.isascii()):
                raise ValueError(f"{name}: {character!r} has a meaning of its own in CSV, or is no ASCII")
        if self.escape is not None and self.escape == (self.delimiter or ","):
            raise ValueError(f"escape: {self.escape!r} stands between cells")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding: Python knows none of the name {self.encoding!r}") from None
        if codecs.lookup(self.encoding).name != "utf-8" and self.source_format == "parquet":
            raise ValueError("encoding: a Parquet file tells its own")

    def require_task(self, task: EngineTask) -> None:
        """Check that an engine can be asked all this.

        Raises:
            SpecError: it is loaded for something else.
        """
        for step in self.all_steps:
            require_kind(step.kind, task)

    def paid_seconds(self, gpus: float, price: float | None) -> float | None:
        """Return how long the task may have an engine for its ``max_cost``; None when it has no such bound.

        That is max_cost / (price * gpus), as if nobody else worked on the engine: whoever shares it pays less.

        Args:
            gpus: of the engine.
            price: of a GPU for an hour, in the currency of ``max_cost``.

        Raises:
            SpecError: there is no price, or nothing that has one.
        """
        if self.max_cost is None:
            return None
        if not price:
            raise SpecError("max_cost: the connection has no price_per_gpu_hour; set it, or leave max_cost out")
        if not gpus:
            raise SpecError("max_cost: the engine has no GPU, which the price is for; use max_tokens_total")
        return self.max_cost / (price * gpus) * _HOUR_S

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
