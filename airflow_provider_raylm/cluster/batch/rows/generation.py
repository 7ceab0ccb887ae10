"""Text that a model writes: prompt or chat, one answer or several, of a type or any."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request, RowError
from airflow_provider_raylm.cluster.batch.rows.answer_types import answer_type
from airflow_provider_raylm.cluster.batch.rows.arrow_types import Unfit
from airflow_provider_raylm.cluster.batch.rows.conversations import compile_messages, may_hold_images
from airflow_provider_raylm.cluster.batch.rows.images import AT_A_TIME
from airflow_provider_raylm.cluster.batch.rows.kept import kept_fields, request_fields
from airflow_provider_raylm.cluster.batch.rows.parameters import compile_parameters
from airflow_provider_raylm.cluster.batch.rows.templates import Row, compile_template
from airflow_provider_raylm.specs import Media, Step

# What a model that is asked again is told first.
_AGAIN = "That answer is not valid: {why}. Answer again with a valid one, and nothing else."
_CUT = "it was cut off at max_tokens"


class Generation:
    """One step of a task that asks for text.

    Attributes:
        question: what the requests of all rows share, as JSON text: the kind of question and an OpenAI request.
        columns: what an answer becomes.
        reasks: new tries for a row whose answer is refused.
        at_a_time: rows whose requests are made side by side: more than one where they have images to wait for.

    Raises:
        BatchError: the step's schema is none, or cannot be imported.
    """

    def __init__(self, step: Step, model: str, media: Media) -> None:
        self._step = step
        self._type = answer_type(step)
        self._overrides = compile_parameters(step)
        self._content = _prompt(step.prompt) if step.prompt is not None else compile_messages(step, media)
        self.at_a_time = AT_A_TIME if media.allowed and may_hold_images(step) else 1
        named = step.adapter if "adapter" not in step.row_parameters else None
        fields = {
            "model": named or model,
            **step.parameters,
            **step.truncation,
            **request_fields(step),
            **step.extra_body,
        }
        if step.n > 1:
            fields["n"] = step.n
        if self._type.constraint is not None:
            fields["structured_outputs"] = self._type.constraint
        kind = "completion" if step.prompt is not None else "chat"
        self.question = json.dumps({"kind": kind, "fields": fields, "keep": step.keep})
        value = pa.list_(self._type.type) if step.n > 1 else self._type.type
        self.columns = [pa.field(step.output_column, value), *kept_fields(step)]
        self.reasks = step.reasks if self._type.constraint is not None else 0

    def request(self, row: Row) -> Request:
        """Return what is a row's own in its request.

        Raises:
            RowError: the row cannot be asked.
        """
        return Request(self._content(row), self._overrides(row))

    def read(self, answer: Answer) -> dict[str, Any] | Refusal:
        """Return an answer as the values of the columns, or why it is none."""
        step = self._step
        cut = answer.finish_reason == "length"
        if cut and step.on_length == "fail":
            return Refusal("answer_cut_off", f"the answer was cut off after max_tokens ({answer.completion_tokens})")
        texts = _texts(answer)
        if cut and answer.extra.get("reasoning") and not any(texts):
            return Refusal("answer_cut_off", "max_tokens ended within the reasoning, before an answer began")
        try:
            values = [self._type.read(text) for text in texts]
        except Unfit as error:
            return Refusal("invalid_output", _CUT if cut else str(error))
        kept = {f"{step.output_column}_{name}": answer.extra.get(name) for name in step.keep}
        return {step.output_column: values if step.n > 1 else values[0], **kept}

    def again(self, request: Request, answer: Answer, refusal: Refusal) -> Request:
        """Return what a row is asked after an answer that was refused: the same, its answer, and what is wrong."""
        text = self._refused(answer)
        why = _AGAIN.format(why=refusal.message)
        if isinstance(request.content, str):
            return request._replace(content=f"{request.content}{text}\n\n{why}\n\n")
        turns = [{"role": "assistant", "content": text}, {"role": "user", "content": why}]
        return request._replace(content=[*request.content, *turns])

    def _refused(self, answer: Answer) -> str:
        """Return which of several texts is none of the type: what is wrong was said of that one."""
        texts = _texts(answer)
        for text in texts:
            try:
                self._type.read(text)
            except Unfit:
                return text
        return texts[0]


def _texts(answer: Answer) -> list[str]:
    return answer.value if isinstance(answer.value, list) else [answer.value]


def _prompt(template: str) -> Any:
    render = compile_template(template)

    def prompt(row: Row) -> str:
        text = render(row)
        if not text.strip():
            raise RowError("empty_prompt", "the rendered prompt is empty")
        return text

    return prompt
