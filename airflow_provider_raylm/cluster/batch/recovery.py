"""How a block outlives its engine. No Ray, no vLLM.

When an engine fails, all rows that are in it fail with it, and nothing says which was at fault, if any was. So what is
missing is asked once more as before, by all blocks together: most failures are no row's fault. What has failed twice is
asked *alone*: its replica holds all other rows of all tasks back meanwhile. Most are answered. A block that makes the
engine fail again is at fault itself; it is asked in ever smaller pieces until one row is left. That is asked once more,
and then refused.

Only rows that were in an engine count as failed: not those that waited, nor those of a replica that was stopped in good
order. What was answered before the failure is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from airflow_provider_raylm.cluster.batch.exchange import Outcome, Refusal, Request
from airflow_provider_raylm.errors import EngineError

# Failures after which a block is asked alone, and, of those, after which a single row is refused: an engine may die of
# something else just then.
TOGETHER = 2
ALONE = 2
# A block of 256 rows is down to one row after two cuts: each costs a start of the engine.
PIECES = 16
# One row at fault fails the engine six times, if it stands first in its block: twice among others, in its block alone,
# in its piece, and twice by itself. An engine that fails more often without having answered anything fails by itself.
FAILURES_IN_A_ROW = 8
# The same, of failures before a row of ours entered: another task's row may be at fault, which takes as many.
UNBEGUN_IN_A_ROW = 30

Answered = list[tuple[int, Outcome]]
"""Outcomes of rows, by their number among those asked about."""


class EngineFailure(Exception):
    """The engine failed while it had this block, or was to get it.

    Attributes:
        begun: whether rows of the block were in an engine that failed.
    """

    def __init__(self, message: str, begun: bool = True) -> None:
        super().__init__(message)
        self.begun = begun


class Ask(Protocol):
    """Gets an outcome for every row."""

    def __call__(self, question: str, requests: Sequence[Request], near: str | None) -> Awaitable[list[Outcome]]:
        """Answer rows.

        Args:
            question: what their requests share, as JSON text.
            requests: what is each row's own.
            near: a name; requests of one name go to one replica, if that is well.
        """


class AskEngine(Protocol):
    """The way to the engine.

    Raises:
        EngineFailure: the engine failed.
    """

    def __call__(
        self, question: str, requests: Sequence[Request], *, alone: bool, near: str | None
    ) -> AsyncGenerator[Answered]:
        """Answer a block, alone or among others, in parts."""


@dataclass
class _Block:
    question: str
    requests: Sequence[Request]
    near: str | None
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def missing(self, rows: Sequence[int]) -> list[int]:
        return [row for row in rows if row not in self.outcomes]


class Recovery:
    """Asks again what an engine failed at; one for a task, shared by its blocks.

    Args:
        ask: the way to the engine.
        wait: returns when the engine is well again; raises EngineError when that takes too long.
    """

    def __init__(self, ask: AskEngine, wait: Callable[[], Awaitable[None]]) -> None:
        self._ask = ask
        self._wait = wait
        self._lock = asyncio.Lock()
        self._life = 0
        self._failures = 0
        self._unbegun = 0
        self._end: EngineError | None = None

    async def __call__(self, question: str, requests: Sequence[Request], near: str | None = None) -> list[Outcome]:
        """Answer a block; a row at which the engine fails by itself is refused (``engine_failure``).

        Raises:
            EngineError: the engine does not come back, or fails whatever it is asked.
        """
        block = _Block(question, requests, near)
        await self._answer(block, range(len(requests)), alone=False)
        return [block.outcomes[row] for row in range(len(requests))]

    async def _answer(self, block: _Block, rows: Sequence[int], *, alone: bool) -> None:
        failures = 0
        while missing := block.missing(rows):
            failure = await self._try(block, missing, alone=alone)
            if failure is None or not failure.begun:
                continue
            failures += 1
            left = block.missing(missing)
            if not alone and failures >= TOGETHER:
                failures, alone = 0, True
            elif alone and len(left) > 1:
                await self._cut(block, left)
            elif alone and failures >= ALONE:
                for row in left:
                    block.outcomes[row] = Refusal(
                        "engine_failure", f"the engine fails when it is asked this row alone: {failure}"
                    )

    async def _cut(self, block: _Block, rows: Sequence[int]) -> None:
        """Ask about pieces of rows, one of which may be at fault."""
        size = -(-len(rows) // PIECES)
        for start in range(0, len(rows), size):
            await self._answer(block, rows[start : start + size], alone=True)

    async def _try(self, block: _Block, rows: Sequence[int], *, alone: bool) -> EngineFailure | None:
        """Ask about some rows; return the engine's failure, if it failed, when it is well again."""
        life = self._life
        requests = [block.requests[row] for row in rows]
        try:
            async with aclosing(self._ask(block.question, requests, alone=alone, near=block.near)) as parts:
                async for part in parts:
                    for number, outcome in part:
                        block.outcomes[rows[number]] = outcome
                    if part:
                        self._failures = self._unbegun = 0
        except EngineFailure as failure:
            async with self._lock:
                await self._recover(life, failure)
            return failure
        if missing := len(block.missing(rows)):
            raise EngineError(f"the engine answered {len(rows) - missing} of {len(rows)} rows of a block")
        return None

    async def _recover(self, life: int, failure: EngineFailure) -> None:
        # Blocks that were in flight together failed together: the first waits for the engine, the others for it.
        if self._end is not None:
            raise self._end
        if life != self._life:
            return
        if failure.begun:
            self._failures += 1
        else:
            self._unbegun += 1
        try:
            if self._failures >= FAILURES_IN_A_ROW or self._unbegun >= UNBEGUN_IN_A_ROW:
                raise EngineError(
                    f"The engine failed {self._failures + self._unbegun} times without an answer in between; the last "
                    f"time: {failure}"
                )
            await self._wait()
        except EngineError as error:
            self._end = error
            raise
        self._life += 1
