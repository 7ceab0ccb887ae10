"""How a block outlives its engine. No Ray, no vLLM.

When an engine fails, every block in flight fails with it, and nothing says which row was at fault, if any was. So each
is asked again *alone*: the engine holds all other blocks of all tasks back meanwhile. Most are answered. One that makes
the engine fail again is at fault itself; it is asked in ever smaller pieces until one row is left, which is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from airflow_provider_raylm.cluster.batch.rows import Answer, Content, Refusal
from airflow_provider_raylm.errors import EngineError

# A block of 256 rows is down to one row after two cuts: each costs a start of the engine.
PIECES = 16
# One row at fault fails the engine four times, if it stands first in its block: among others, in its block alone, in
# its piece and by itself. An engine that fails more often without having answered anything fails by itself.
FAILURES_IN_A_ROW = 6


class EngineFailure(Exception):
    """The engine failed while it had this block, or was to get it.

    Attributes:
        begun: whether the block was with the engine; False only for one that was to be asked alone.
    """

    def __init__(self, message: str, begun: bool = True) -> None:
        super().__init__(message)
        self.begun = begun


class AskEngine(Protocol):
    """The way to the engine.

    Raises:
        EngineFailure: the engine failed.
    """

    def __call__(self, fields: str, contents: Sequence[Content], *, alone: bool) -> list[Answer | Refusal]:
        """Answer a block, alone or among others."""


class Recovery:
    """Asks again what an engine failed at; one for a task, shared by its threads.

    Args:
        ask: the way to the engine.
        wait: returns when the engine is well again; raises EngineError when that takes too long.
    """

    def __init__(self, ask: AskEngine, wait: Callable[[], None]) -> None:
        self._ask = ask
        self._wait = wait
        self._lock = threading.Lock()
        self._life = 0
        self._failures = 0
        self._end: EngineError | None = None

    def __call__(self, fields: str, contents: Sequence[Content]) -> list[Answer | Refusal]:
        """Answer a block; a row at which the engine fails by itself is refused (``engine_failure``).

        Raises:
            EngineError: the engine does not come back, or fails whatever it is asked.
        """
        outcome = self._try(fields, contents, alone=False)
        return self._alone(fields, contents) if isinstance(outcome, EngineFailure) else outcome

    def _alone(self, fields: str, contents: Sequence[Content]) -> list[Answer | Refusal]:
        outcome = self._try(fields, contents, alone=True)
        while isinstance(outcome, EngineFailure) and not outcome.begun:
            outcome = self._try(fields, contents, alone=True)
        if not isinstance(outcome, EngineFailure):
            return outcome
        if len(contents) == 1:
            return [Refusal("engine_failure", f"the engine fails when it is asked this row alone: {outcome}")]
        size = -(-len(contents) // PIECES)
        pieces = (contents[start : start + size] for start in range(0, len(contents), size))
        return [answer for piece in pieces for answer in self._alone(fields, piece)]

    def _try(self, fields: str, contents: Sequence[Content], *, alone: bool) -> list[Answer | Refusal] | EngineFailure:
        """Return the answers, or the engine's failure when the engine is well again."""
        life = self._life
        try:
            answers = self._ask(fields, contents, alone=alone)
        except EngineFailure as failure:
            with self._lock:
                self._recover(life, failure)
            return failure
        self._failures = 0
        return answers

    def _recover(self, life: int, failure: EngineFailure) -> None:
        # Blocks that were in flight together failed together: the first waits for the engine, the others for it.
        if self._end is not None:
            raise self._end
        if life != self._life:
            return
        self._failures += 1
        try:
            if self._failures >= FAILURES_IN_A_ROW:
                raise EngineError(
                    f"The engine failed {self._failures} times without an answer in between; the last time: {failure}"
                )
            self._wait()
        except EngineError as error:
            self._end = error
            raise
        self._life += 1
