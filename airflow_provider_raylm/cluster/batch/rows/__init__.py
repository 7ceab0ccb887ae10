"""From a row to what the engine is asked, and from its answer to columns: one class for each kind of question.

A kind stands in ``KINDS`` under the field of ``Step`` that asks it. The stage knows none: it takes what
``compile_step`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request
from airflow_provider_raylm.cluster.batch.rows.generation import Generation
from airflow_provider_raylm.cluster.batch.rows.pooling import Classification, Embedding, Scoring
from airflow_provider_raylm.cluster.batch.rows.templates import Row
from airflow_provider_raylm.specs import Step


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

    def request(self, row: Row) -> Request:
        """Return what is a row's own in its request; raises RowError."""

    def read(self, answer: Answer) -> dict[str, Any] | Refusal:
        """Return an answer as the values of the columns, or why it is none."""

    def again(self, request: Request, answer: Answer, refusal: Refusal) -> Request:
        """Return what a row is asked after an answer that was refused."""


KINDS: dict[str, Callable[[Step, str, int], Question]] = {
    "prompt": lambda step, model, _: Generation(step, model),
    "messages": lambda step, model, _: Generation(step, model),
    "embed": lambda step, _, vector_size: Embedding(step, vector_size),
    "classify": lambda step, _, vector_size: Classification(step, vector_size),
    "score": lambda step, _, vector_size: Scoring(step, vector_size),
}


def compile_step(step: Step, model: str, vector_size: int = 0) -> Question:
    """Return a step as the stage works with it.

    Args:
        step: what the author says.
        model: the engine's served model name.
        vector_size: how many numbers an embedding of the engine has; 0 if it is not known.

    Raises:
        BatchError: it names what cannot be imported, or a schema that is none.
    """
    return KINDS[step.kind](step, model, vector_size)
