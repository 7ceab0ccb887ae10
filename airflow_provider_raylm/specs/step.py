"""One question to the model per row: what an author says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, model_validator

from airflow_provider_raylm.errors import SpecError
from airflow_provider_raylm.specs.base import RESERVED_PREFIX, JsonObject, Value
from airflow_provider_raylm.specs.extra_body import check_extra_body
from airflow_provider_raylm.specs.per_row import PerRow, column_of, placeholders
from airflow_provider_raylm.specs.turns import Turn, templates_of

Kept = Literal["reasoning", "tool_calls", "logprobs", "token_ids", "prompt_token_ids"]
"""What an answer has beside its text."""


_KINDS_OF_TASKS: dict[str, tuple[str, ...]] = {
    "generate": ("prompt", "messages"),
    # Two embeddings have a score, too.
    "embed": ("embed", "score"),
    "classify": ("classify",),
    # A reranker is a classifier that knows one class.
    "score": ("score", "classify"),
}


def require_kind(kind: str, task: str) -> None:
    """Check that an engine can be asked a kind of question.

    Args:
        kind: the field of a Step that asks it.
        task: what the engine is loaded for.

    Raises:
        SpecError: it cannot; the text says what can.
    """
    if kind not in _KINDS_OF_TASKS[task]:
        able = [name for name, kinds in _KINDS_OF_TASKS.items() if kind in kinds]
        raise SpecError(
            f"{kind}: this engine is loaded for task={task!r}, which answers {' and '.join(_KINDS_OF_TASKS[task])}; "
            f"deploy one with task={' or '.join(map(repr, able))}"
        )


def _stops(text: str) -> str:
    if not text:
        raise ValueError("an empty string ends no answer; leave it out")
    return text


StopString = Annotated[str, AfterValidator(_stops)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Positive = Annotated[float, Field(gt=0)]


class Step(Value):
    """One question to the model per row: a prompt (completion), messages (chat), or a text to embed, classify or score.

    ``${column}`` in a template stands for the row's value of that column; ``$${`` is a literal ``${``; a ``$``
    without a brace is text. A sampling field may be ``"${column}"``, too: each row has its own value then. A value left
    out is the model's own default, as vLLM serves it.
    """

    prompt: str | None = Field(None, description="Template of a completion request.")
    messages: Annotated[tuple[Turn, ...] | str | None, PerRow(tuple[Turn, ...])] = Field(
        None,
        description="A chat: dicts with role and content (a template, or parts); `${column}` stands for a row's turns.",
    )
    embed: str | None = Field(None, description="Template of a text whose embedding is asked for.")
    classify: str | None = Field(None, description="Template of a text whose class is asked for.")
    score: tuple[str, str] | None = Field(
        None, description="Templates of two texts: how well the second fits the first."
    )
    output_column: str = Field("response", min_length=1, description="Column that receives the answer.")
    max_tokens: Annotated[int | str, PerRow(Count)] = Field(256, description="New tokens per row, at most.")
    temperature: Annotated[float | str | None, PerRow(NotNegative)] = None
    top_p: Annotated[float | str | None, PerRow(PositiveShare)] = None
    top_k: Annotated[int | str | None, PerRow(Annotated[int, Field(ge=-1)])] = None
    min_p: Annotated[float | str | None, PerRow(Share)] = None
    seed: Annotated[int | str | None, PerRow(int)] = None
    stop: Annotated[tuple[str, ...] | str | None, PerRow(tuple[StopString, ...])] = None
    presence_penalty: Annotated[float | str | None, PerRow(Penalty)] = None
    frequency_penalty: Annotated[float | str | None, PerRow(Penalty)] = None
    repetition_penalty: Annotated[float | str | None, PerRow(Positive)] = None
    ignore_eos: Annotated[bool | str | None, PerRow(bool)] = None
    adapter: Annotated[str | None, PerRow(str)] = Field(
        None, description="One of the engine's LoRA adapters; default: the model without one."
    )
    n: int = Field(1, ge=1, description="Answers per row; above 1 the column is a list.")
    output_schema: JsonObject | str | None = Field(
        None, description="JSON Schema, or package.module:Model (pydantic): the answer is a value of its type."
    )
    choice: tuple[str, ...] | None = Field(None, min_length=1, description="The answer is one of these.")
    regex: str | None = Field(None, description="The answer matches this expression.")
    grammar: str | None = Field(None, description="The answer follows this grammar, as vLLM reads it.")
    reasks: int = Field(
        1, ge=0, description="New tries for an answer that does not fit output_schema, choice or regex."
    )
    on_length: Literal["write", "fail"] = Field(
        "write", description="What becomes of a row whose answer is cut off by max_tokens."
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Tokens of a longer prompt to keep; -1 for as many as there is room for."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Where a longer prompt is cut; default: as its tokenizer does, most on the right."
    )
    keep: tuple[Kept, ...] = Field(
        (), description="What of the answer has a column of its own, named <output_column>_<name>."
    )
    dimensions: int | None = Field(None, ge=1, description="Numbers of an embedding, where the model offers fewer.")
    normalize: bool | None = Field(None, description="Whether embeddings are of length 1; default: the model's own.")
    vector_type: Literal["float32", "float16"] = Field("float32", description="Type of an embedding's numbers.")
    probabilities: bool = Field(False, description="All classes with their probabilities, instead of the likeliest.")
    extra_body: JsonObject = Field(
        default_factory=dict,
        description="Further fields of vLLM's OpenAI request, e.g. chat_template_kwargs.",
    )

    kinds: ClassVar[tuple[str, ...]] = ("prompt", "messages", "embed", "classify", "score")
    # What one kind alone heeds; prompt and messages heed all others.
    _of_kinds: ClassVar[dict[str, tuple[str, ...]]] = {
        "embed": ("dimensions", "normalize", "vector_type"),
        "classify": ("probabilities",),
        "score": (),
    }
    truncation_fields: ClassVar[tuple[str, ...]] = ("truncate_prompt_tokens", "truncation_side")
    _of_all: ClassVar[tuple[str, ...]] = ("output_column", "extra_body", *truncation_fields)
    sampling_fields: ClassVar[tuple[str, ...]] = (
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
    constraints: ClassVar[tuple[str, ...]] = ("output_schema", "choice", "regex", "grammar")
    _not_in_extra_body: ClassVar[frozenset[str]] = frozenset(
        {*sampling_fields, *truncation_fields, "prompt", "messages", "n", "dimensions"}
    )

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        self._check_messages()
        adapter = None if column_of(self.adapter) else self.adapter
        if adapter is not None and (not adapter.strip() or placeholders(adapter)):
            raise ValueError(f"adapter: a name, or '${{column}}' and nothing else, got {self.adapter!r}")
        if self.output_column.startswith(RESERVED_PREFIX):
            raise ValueError(f"output_column: the prefix {RESERVED_PREFIX!r} is reserved")
        self._check_kind()
        check_extra_body(self.extra_body, self._asked, self._not_in_extra_body, self.keep)
        self._check_constraint()
        self._check_truncation()
        for name in ("reasoning", "tool_calls"):
            if name in self.keep and self.prompt is not None:
                raise ValueError(f"keep: {name!r} is a chat's; ask with messages")
        return self

    def _check_messages(self) -> None:
        if self.messages == ():
            raise ValueError("messages: there are none; give at least one turn")
        for message in [one for one in self.messages or () if isinstance(one, dict)]:
            if set(message) != {"role", "content"}:
                raise ValueError(f"messages: each needs role and content, got {sorted(message)}")
            role = message["role"]
            if not isinstance(role, str) or not role or placeholders(role):
                raise ValueError(f"messages: a role is a word, which no row fills in, got {role!r}")

    @property
    def kind(self) -> str:
        """The field that asks the question."""
        return self._asked[0]

    @property
    def _asked(self) -> list[str]:
        return [kind for kind in self.kinds if getattr(self, kind) is not None]

    @property
    def is_determined(self) -> bool:
        """Whether equal questions have equal answers."""
        return self.temperature == 0 or not self._of_kinds.keys().isdisjoint(self._asked)

    def _check_kind(self) -> None:
        """Refuse what the kind of question does not heed; which kind it is, is checked where all is known."""
        asked = self._asked
        if len(asked) != 1:
            return
        pooled = {name for names in self._of_kinds.values() for name in names}
        heeded = {*self._of_all, *self.kinds}
        heeded |= set(self._of_kinds[asked[0]]) if asked[0] in self._of_kinds else set(Step.model_fields) - pooled
        for name in Step.model_fields:
            if name not in heeded and self.differs(name):
                raise ValueError(f"{name}: has no effect on {asked[0]}; leave it out")

    def differs(self, name: str) -> bool:
        """Return whether a field has another value than its default."""
        field = type(self).model_fields[name]
        return bool(getattr(self, name) != field.get_default(call_default_factory=True))

    def _check_truncation(self) -> None:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: 0 leaves nothing of a prompt")
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise ValueError("truncation_side: nothing is cut without truncate_prompt_tokens; give that, too")

    def _check_constraint(self) -> None:
        given = [name for name in self.constraints if getattr(self, name) is not None]
        given += [f"extra_body.{name}" for name in ("structured_outputs", "response_format") if name in self.extra_body]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: the answer is held to {given[0]} already; give one of them")
        if isinstance(self.output_schema, str) and not re.fullmatch(r"[\w.]+:\w+", self.output_schema):
            raise ValueError(
                f"output_schema: expected a JSON Schema or package.module:Model, got {self.output_schema!r}"
            )
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex: {error}") from None
        checked = any(getattr(self, name) is not None for name in ("output_schema", "choice", "regex"))
        if self.reasks != type(self).model_fields["reasks"].default and not checked:
            raise ValueError("reasks: only for answers that are held to output_schema, choice or regex")

    @property
    def parameters(self) -> dict[str, JsonValue]:
        """Sampling fields whose value all rows share."""
        chosen = self.model_dump(mode="json", include=set(self.sampling_fields), exclude_none=True)
        return {name: value for name, value in chosen.items() if name not in self.row_parameters}

    @property
    def truncation(self) -> dict[str, JsonValue]:
        """What is to become of a longer prompt, by vLLM's names."""
        return self.model_dump(mode="json", include=set(self.truncation_fields), exclude_none=True)

    @property
    def row_parameters(self) -> dict[str, str]:
        """Fields that each row tells, with the column that does."""
        found = {name: column_of(getattr(self, name)) for name in (*self.sampling_fields, "adapter")}
        return {name: column for name, column in found.items() if column is not None}

    @property
    def templates(self) -> Iterator[str]:
        """Every template of the question."""
        for text in (self.prompt, self.embed, self.classify, *(self.score or ())):
            if text is not None:
                yield text
        turns = (self.messages,) if isinstance(self.messages, str) else self.messages or ()
        for turn in turns:
            yield from templates_of(turn if isinstance(turn, str) else turn["content"])

    @property
    def columns_used(self) -> frozenset[str]:
        """Names of the columns that the question needs."""
        named = {name for template in self.templates for name in placeholders(template)}
        return frozenset(named | set(self.row_parameters.values()))

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Names of the columns that the answer becomes."""
        return (self.output_column, *(f"{self.output_column}_{name}" for name in self.keep))
