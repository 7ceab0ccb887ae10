"""What a look at a task brings before it runs: the plan of its source, and some of its rows with their answers."""

from __future__ import annotations

from pydantic import Field

from airflow_provider_raylm.specs.base import Value


class PlanReport(Value):
    """What a task would read, as far as that is known without asking a row."""

    files: int = Field(ge=0)
    rows: int | None = Field(description="Rows of the source; None when only reading tells.")
    bytes: int = Field(ge=0, description="Of the files, as they are stored.")
    columns: dict[str, str] = Field(description="Columns that the task needs, with their Arrow types.")
    answers: dict[str, str] = Field(description="Columns of an answered row, with their Arrow types.")


class RowCounts(Value):
    """What a row took; no text of it."""

    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    seconds: float = Field(ge=0, description="From its first question to its last answer.")
    reason: str | None = Field(None, description="Why it failed; None when it was answered.")


class PreviewRow(Value):
    """A row with its answer, in texts that are cut."""

    row_id: str
    asked: tuple[str, ...] = Field((), description="Every question, in the order in which they were asked.")
    answer: dict[str, str] = Field(default_factory=dict, description="By output column.")
    finish_reason: str = ""
    message: str = Field("", description="Why it failed, as a sentence.")


class PreviewReport(Value):
    """What some rows of a task come to; nothing of it is written anywhere."""

    plan: PlanReport
    counts: tuple[RowCounts, ...] = Field(description="Of the rows that were asked, in the source's order.")
    seconds: float = Field(ge=0, description="From the first question to the last answer.")
    capacity: int = Field(ge=1, description="Rows that the engine works on at a time.")
    replicas: int = Field(ge=1, description="Replicas that took part.")
    sealed: str = Field(
        "", description="The PreviewRows as JSON, for who has the pad; empty when nobody asked for them."
    )
