"""What goes between a task and its engine: a request for each row, and what comes of it. It names no kind."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Content = str | Sequence[Mapping[str, Any]]
"""What is asked: a prompt, or the messages of a chat."""


class Request(NamedTuple):
    """What is a row's own in what the engine is asked.

    Attributes:
        content: what is asked.
        overrides: fields of the OpenAI request that this row has otherwise than the others, as JSON text; "" for none.
    """

    content: Content
    overrides: str = ""


# Ray carries arguments of up to 100 kB in the call itself, together up to 10 MB. A larger one goes through its object
# store, which takes a tenth of a second longer where several are in flight.
_PIECE_BYTES = 90_000
_BYTES_IN_CALL = 8_000_000


def packed(requests: Sequence[Request]) -> list[bytes]:
    """Return requests as arguments that a call to an engine may have; a block of more than 8 MB is one."""
    # As two lists: pickle calls Python for each value of a class.
    whole = pickle.dumps([[one.content for one in requests], [one.overrides for one in requests]], protocol=5)
    size = _PIECE_BYTES if len(whole) <= _BYTES_IN_CALL else len(whole)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def unpacked(pieces: Sequence[bytes]) -> list[Request]:
    """Return the requests that were packed."""
    contents, overrides = pickle.loads(b"".join(pieces))  # noqa: S301  # whoever calls an engine runs its code
    return list(map(Request, contents, overrides))


@dataclass(frozen=True)
class Answer:
    """What the model said to one row; token counts are vLLM's own.

    Attributes:
        value: the text, or a list of as many texts as were asked for.
        finish_reason: vLLM's; of several answers ``length`` if one was cut off.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of all answers.
        cached_tokens: those of the prompt whose keys and values the engine had.
        extra: what else the row is to keep, by its name in ``Step.keep``.
        truncated: whether the prompt was longer than the row's truncate_prompt_tokens.
    """

    value: str | list[str]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a row has no answer.

    Attributes:
        reason: a short class of failure, stable enough to count and to filter by.
        message: the whole sentence, as any file can hold it.
    """

    reason: str
    message: str

    def __post_init__(self) -> None:
        """Escape half characters (lone surrogates), which a message may quote from a row or an answer."""
        object.__setattr__(self, "message", self.message.encode(errors="backslashreplace").decode())


class RowError(Exception):
    """One row cannot be asked; the others continue. Its arguments are those of a ``Refusal``."""

    @property
    def refusal(self) -> Refusal:
        """The reason as a value."""
        return Refusal(*self.args)


Outcome = Answer | Refusal
"""What comes of a row."""


@dataclass(frozen=True)
class Part:
    """What a replica says of a block while it answers it.

    Attributes:
        replica: who says it.
        begun: whether a row of the block has entered the engine.
        outcomes: of the rows that have ended since the part before, by their number in the block.
    """

    replica: str
    begun: bool
    outcomes: list[tuple[int, Outcome]]
