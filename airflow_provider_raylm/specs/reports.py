"""What came of it: of the rows of a task, of an engine's life, of a teardown and a sweep."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from airflow_provider_raylm.specs.base import Value
from airflow_provider_raylm.specs.engine import Labels


class BatchReport(Value):
    """What became of the rows of one task. Its counts reconcile, or it cannot be built."""

    rows_in: int = Field(ge=0)
    rows_written: int = Field(ge=0)
    rows_quarantined: int = Field(ge=0)
    rows_already_done: int = Field(0, ge=0)
    failures: dict[str, int] = Field(default_factory=dict, description="Quarantined rows by reason.")
    prompt_tokens: int = 0
    cached_prompt_tokens: int = Field(0, description="Those of prompt_tokens that the engine had in its cache.")
    completion_tokens: int = 0
    truncated_prompts: int = Field(
        0, description="Prompts longer than truncate_prompt_tokens, each time they were asked."
    )
    cut_off: int = Field(0, description="Answers that ended at max_tokens, written or not.")
    reasked: int = Field(0, description="Answers that did not fit, so that their row was asked again.")
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


FAILED_ROWS = 5
"""Failed rows that a job tells of while it works."""


class FailedRow(Value):
    """A row that failed, as its job tells of it where others may read: by its id, and by no other value that it has."""

    row_id: str
    reason: str
    message: str = Field("", description="Empty where it may quote the row; the quarantine has it.")


# A log is text that others write into, too: what cannot be counted with is no record.
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Progress(Value):
    """How far a task is, as its job prints it while it works."""

    at: float = Field(0.0, allow_inf_nan=False, description="Unix seconds, by the cluster's clock.")
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False, description="Seconds since this attempt began.")
    rows: _Count = Field(0, description="Rows that ended in this attempt, written or failed.")
    total: _Count | None = Field(None, description="Rows that this attempt has to answer; None while nobody knows.")
    failures: dict[str, _Count] = Field(default_factory=dict, description="Failed rows by reason.")
    failed_rows: tuple[FailedRow, ...] = Field((), max_length=FAILED_ROWS, description="The first of them.")
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return sum(self.failures.values())

    @property
    def rows_per_s(self) -> float:
        """Rows per second of this attempt, start-up included."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of this attempt, start-up included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all rows have ended, at the rate so far; None while that cannot be told."""
        if self.total is None or not self.rows_per_s:
            return None
        return max(self.total - self.rows, 0) / self.rows_per_s

    def line(self) -> str:
        """Return it for people: rows, failed rows, rows/s, tokens/s, and the time left when it is known."""
        of = f" of {self.total}" if self.total is not None else ""
        left = [f"{self.seconds_left:.0f} s left"] if self.seconds_left is not None else []
        rates = [f"{self.rows_per_s:.1f} rows/s", f"{self.tokens_per_s:.0f} tokens/s"]
        return ", ".join([f"{self.rows}{of} rows", f"{self.failed} failed", *rates, *left])


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
    """An engine of this provider as found on the cluster. What its lease does not tell, for now, is None or empty."""

    application: str
    status: str
    fingerprint: str
    labels: Labels
    age_seconds: float | None = Field(description="None when its lease does not answer.")
    working: tuple[str, ...] | None = Field(
        (), description="Outputs of the tasks that are at work on it; None when its lease does not answer."
    )
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
