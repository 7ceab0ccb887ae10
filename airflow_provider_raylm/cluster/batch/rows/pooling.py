"""What encoders and rerankers give for a text: an embedding, a class, a score."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request, RowError
from airflow_provider_raylm.cluster.batch.rows.templates import Row, compile_template
from airflow_provider_raylm.specs import Step

_CLASS = pa.struct([("label", pa.string()), ("probability", pa.float64())])


class _Pooling:
    """One step of a task that asks for what a model makes of a text, in one pass.

    Attributes:
        question: what the requests of all rows share, as JSON text: the kind of question and vLLM's pooling parameters.
        columns: what an answer becomes.
        reasks: none: the same text has the same answer.
        at_a_time: rows whose requests are made side by side.
    """

    kind: ClassVar[str]
    reasks: ClassVar[int] = 0
    at_a_time: ClassVar[int] = 1

    def __init__(self, step: Step, vector_size: int) -> None:
        self._step = step
        self._texts = [compile_template(template) for template in step.templates]
        chosen = {"dimensions": step.dimensions, "use_activation": step.normalize, **step.truncation}
        fields = {name: value for name, value in chosen.items() if value is not None} | step.extra_body
        self.question = json.dumps({"kind": self.kind, "fields": fields, "keep": []})
        self.columns = [pa.field(step.output_column, self._type(vector_size))]

    def _type(self, vector_size: int) -> pa.DataType:
        raise NotImplementedError

    def request(self, row: Row) -> Request:
        """Return what is a row's own in its request.

        Raises:
            RowError: the row cannot be asked.
        """
        texts = [text(row) for text in self._texts]
        if not all(text.strip() for text in texts):
            raise RowError("empty_prompt", "the rendered text is empty")
        # Of a score they are two.
        return Request(texts[0] if len(texts) == 1 else json.dumps(texts))

    def read(self, answer: Answer) -> dict[str, Any] | Refusal:
        """Return an answer as the value of the column."""
        return {self._step.output_column: self._value(answer.value)}

    def _value(self, value: Any) -> Any:
        return value

    def again(self, request: Request, answer: Answer, refusal: Refusal) -> Request:
        """Never happens: no answer is refused."""
        raise AssertionError(refusal)


class Embedding(_Pooling):
    """A vector for each text."""

    kind = "embed"

    def _type(self, vector_size: int) -> pa.DataType:
        number = pa.float16() if self._step.vector_type == "float16" else pa.float32()
        return pa.list_(number, self._step.dimensions or vector_size or -1)

    def _value(self, value: Any) -> Any:
        return value.astype(self._step.vector_type)


class Classification(_Pooling):
    """A class for each text, or all of them, the likeliest first."""

    kind = "classify"

    def _type(self, vector_size: int) -> pa.DataType:
        return pa.list_(_CLASS) if self._step.probabilities else _CLASS

    def _value(self, value: Any) -> Any:
        classes = sorted(
            ({"label": label, "probability": probability} for label, probability in value),
            key=lambda one: -one["probability"],
        )
        return classes if self._step.probabilities else classes[0]


class Scoring(_Pooling):
    """How well a second text fits a first one."""

    kind = "score"

    def _type(self, vector_size: int) -> pa.DataType:
        return pa.float64()
