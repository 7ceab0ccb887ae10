"""From a row to what the engine is asked, and from its answer to columns: one class for each kind of question.

A kind stands in ``KINDS`` under the field of ``Step`` that asks it. The stage knows none: it takes what
``compile_step`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request
from airflow_provider_raylm.cluster.batch.rows.generation import Generation
from airflow_provider_raylm.cluster.batch.rows.pooling import Classification, Embedding, Scoring
from airflow_provider_raylm.cluster.batch.rows.templates import Row
from airflow_provider_raylm.specs import EngineRef, Media, Step


class Question(Protocol):
    """One step of a task: what is asked of each row, and the columns that the answers become."""

    @property
    def question(self) -> str:
        """What the requests of all rows share, as JSON text with the ``kind`` that the replica knows it by."""

    @property
    def columns(self) -> Sequence[pa.Field]:
        """What an answer becomes."""

    @property
    def reasks(self) -> int:
        """New tries for a row whose answer is refused."""

    @property
    def at_a_time(self) -> int:
        """Rows whose requests are made side by side: more than one where a storage is waited for."""

    def request(self, row: Row) -> Request:
        """Return what is a row's own in its request; raises RowError."""

    def read(self, answer: Answer) -> dict[str, Any] | Refusal:
        """Return an answer as the values of the columns, or why it is none."""

    def again(self, request: Request, answer: Answer, refusal: Refusal) -> Request:
        """Return what a row is asked after an answer that was refused."""


@dataclass(frozen=True)
class EngineTraits:
    """What a question depends on of the engine that is asked.

    Attributes:
        model: its served model name.
        vector_size: how many numbers an embedding of it has; 0 if it is not known.
        media: which images rows may name.
    """

    model: str = ""
    vector_size: int = 0
    media: Media = field(default_factory=Media)

    @classmethod
    def of(cls, ref: EngineRef) -> EngineTraits:
        """Return it as its reference tells."""
        return cls(ref.model, ref.vector_size, ref.media)


KINDS: dict[str, Callable[[Step, EngineTraits], Question]] = {
    "prompt": lambda step, engine: Generation(step, engine.model, engine.media),
    "messages": lambda step, engine: Generation(step, engine.model, engine.media),
    "embed": lambda step, engine: Embedding(step, engine.vector_size),
    "classify": lambda step, engine: Classification(step, engine.vector_size),
    "score": lambda step, engine: Scoring(step, engine.vector_size),
}


def compile_step(step: Step, engine: EngineTraits) -> Question:
    """Return a step as the stage works with it.

    Args:
        step: what the author says.
        engine: whom it is asked.

    Raises:
        BatchError: it names what cannot be imported, or a schema that is none.
    """
    return KINDS[step.kind](step, engine)
