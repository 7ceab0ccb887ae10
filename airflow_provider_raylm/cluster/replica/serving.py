"""How a replica answers a block: row by row, as places in the engine get free, and in parts, as answers come.

What has been handed over is not lost when the engine dies, and who waits for the rest knows that it lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

from airflow_provider_raylm.cluster.batch.exchange import Outcome, Part
from airflow_provider_raylm.cluster.replica.admission import Admission, Door, Enter

# A part is said so often, with answers or without.
PART_PERIOD_S = 1.0
# A little less than Serve takes to notice that a replica is not well.
GIVE_WAY_S = 5.0

Row = Callable[[Enter], Awaitable[Outcome]]
"""Prepares a row, enters, and returns what came of it; raises EngineError when that was not the row's fault."""


async def in_parts(replica: str, rows: Sequence[Row], admission: Admission, door: Door) -> AsyncGenerator[Part]:
    """Work on all rows of a block, and yield what comes of them until all have ended.

    Raises:
        EngineError: the engine failed, or nothing moves; what has not ended is given up.
    """
    if admission.ended:
        # Nobody has fewer rows than a replica whose engine is dead: callers would choose it again and again until Serve
        # takes it out.
        await asyncio.sleep(GIVE_WAY_S)
        admission.require_open()
    block = _Block(len(rows))
    tasks = [asyncio.create_task(block.work(number, row, partial(door, block.note))) for number, row in enumerate(rows)]
    try:
        over = block.over
        while not over:
            with suppress(TimeoutError):
                await asyncio.wait_for(block.news.wait(), PART_PERIOD_S)
            block.news.clear()
            # Before it is handed over: a row may end meanwhile.
            over = block.over
            yield Part(replica, block.begun, block.take())
            if not over:
                admission.require_open()
        if block.error is not None:
            raise block.error
    finally:
        for task in tasks:
            task.cancel()


class _Block:
    """Rows in flight through the engine.

    Attributes:
        left: how many have not ended.
        begun: whether one has entered.
        error: by which they all end.
        news: set when there is something to say at once.
    """

    def __init__(self, rows: int) -> None:
        self.left = rows
        self.begun = False
        self.error: Exception | None = None
        self.news = asyncio.Event()
        self._outcomes: list[tuple[int, Outcome]] = []

    @property
    def over(self) -> bool:
        """Whether all rows have ended."""
        return not self.left or self.error is not None

    async def work(self, number: int, row: Row, enter: Enter) -> None:
        """See one row through."""
        try:
            outcome = await row(enter)
            self._outcomes.append((number, outcome))
        except Exception as error:
            self.error = self.error or error
        self.left -= 1
        if self.over:
            self.news.set()

    def note(self) -> None:
        """Note that a row has entered."""
        if not self.begun:
            self.begun = True
            self.news.set()

    def take(self) -> list[tuple[int, Outcome]]:
        """Return what has come since the last time."""
        taken, self._outcomes = self._outcomes, []
        return taken
