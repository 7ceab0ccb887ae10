"""How much of a task is in flight at a time, and how it stays so much. No Ray, no vLLM."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TypeVar

from airflow_provider_raylm.cluster.batch.exchange import Request
from airflow_provider_raylm.cluster.batch.recovery import Answered, AskEngine

# Blocks that a replica has at a time, as Serve counts them, before it is given help: see llm.llm_deployment.
BUSY_BLOCKS = 4
# So many there are at least: more than are needed for help, so that an engine that may grow does.
LEAST_BLOCKS = 6
# Of blocks that are worked on, for each that may be in flight: what has been answered but for its longest rows, and
# what has been read and rendered to be asked next.
BLOCKS_AT_WORK = 4
# Arrow's bytes of the blocks that are worked on, for one stage. Python, JSON and Ray hold each about four times over.
BYTES_AT_WORK = 128 * 2**20

Item = TypeVar("Item")
Result = TypeVar("Result")


class Window:
    """Bounds what is in flight: rows that are asked and not answered, blocks that are worked on, and their bytes.

    Rows are what keeps an engine full, whatever their lengths: twice what it works on at a time. While one half is
    worked on the other waits at the replica, so that the way there and back is never waited for; more would only wait
    longer.

    Args:
        in_flight_rows: the author's own bound of rows, or None: as many as the engine needs.
        block_rows: rows per block.
        nbytes: bytes of the blocks that are worked on.

    Attributes:
        most_rows: rows that are asked and not answered, at most, and a block more.
    """

    def __init__(self, in_flight_rows: int | None, block_rows: int, nbytes: int = BYTES_AT_WORK) -> None:
        self._chosen = in_flight_rows
        self._block_rows = block_rows
        self._most_bytes = nbytes
        self._rows = self._blocks = self._bytes = 0
        self._changed = asyncio.Condition()
        self.most_rows = self._most_blocks = 1
        self._over = False
        self.fit(1.0, 1.0)

    def fit(self, capacity: float, replicas: float) -> None:
        """Follow the engine, as much of it as is this stage's.

        Args:
            capacity: rows that it works on at a time.
            replicas: how many it has.
        """
        if self._chosen is not None:
            self.most_rows = self._chosen
            self._most_blocks = math.ceil(self._chosen / self._block_rows)
            return
        self.most_rows = math.ceil(max(2 * capacity, LEAST_BLOCKS * self._block_rows * replicas))
        self._most_blocks = BLOCKS_AT_WORK * math.ceil(self.most_rows / self._block_rows)

    async def end(self) -> None:
        """Let nothing more be asked."""
        self._over = True
        await self.tell()

    async def tell(self) -> None:
        """Let those in who wait, after a change."""
        async with self._changed:
            self._changed.notify_all()

    @asynccontextmanager
    async def block(self, nbytes: int) -> AsyncIterator[None]:
        """Have one more block worked on while the body runs; its first has to wait for room.

        Args:
            nbytes: of the block; one that is larger than all may be worked on alone.
        """
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    not self._blocks or (self._blocks < self._most_blocks and self._bytes + nbytes <= self._most_bytes)
                )
            )
            self._blocks += 1
            self._bytes += nbytes
        try:
            yield
        finally:
            self._blocks -= 1
            self._bytes -= nbytes
            await self.tell()

    def metered(self, ask: AskEngine) -> AskEngine:
        """Return a function that asks when there is room for rows, and makes room with every answer."""

        async def asked(
            question: str, requests: Sequence[Request], *, alone: bool, near: str | None
        ) -> AsyncGenerator[Answered]:
            open_rows = len(requests)
            async with self._changed:
                # One block more than fits: there has to be a whole one waiting when the last row of another ends.
                await self._changed.wait_for(lambda: self._over or self._rows < self.most_rows)
                if self._over:
                    raise asyncio.CancelledError("the task has ended before this was asked")
                self._rows += open_rows
            try:
                async with aclosing(ask(question, requests, alone=alone, near=near)) as parts:
                    async for part in parts:
                        if part:
                            open_rows -= len(part)
                            self._rows -= len(part)
                            await self.tell()
                        yield part
            finally:
                self._rows -= open_rows
                await self.tell()

        return asked


async def in_order(
    work: Callable[[Item], Awaitable[Result]],
    items: AsyncIterator[Item],
    window: Window,
    nbytes: Callable[[Item], int],
) -> AsyncGenerator[Result]:
    """Yield what comes of all items in their order, while as many are worked on as the window has room for.

    Items are taken and worked on whether or not the caller asks for the next result: Ray Data asks when it has dealt
    with the last one, and the engine would be idle until then. A slow item delays only what is yielded. The first error
    ends it: what has been begun is finished, nothing more is begun.
    """
    begun: list[asyncio.Task[Result]] = []
    news = asyncio.Event()
    errors: list[BaseException] = []

    async def feed() -> None:
        async for item in items:
            if errors:
                return
            entered = asyncio.Event()
            begun.append(asyncio.create_task(_worked(partial(work, item), nbytes(item), window, entered, errors)))
            news.set()
            await entered.wait()

    feeding = asyncio.create_task(feed())
    feeding.add_done_callback(lambda _: news.set())
    try:
        while begun or not feeding.done():
            if not begun:
                news.clear()
                await news.wait()
                continue
            await asyncio.wait(begun[:1])
            if begun[0].cancelled() or begun[0].exception() is not None:
                raise errors[0]
            yield begun.pop(0).result()
        await feeding
    finally:
        await window.end()
        feeding.cancel()
        await asyncio.gather(feeding, *begun, return_exceptions=True)


async def _worked(
    work: Callable[[], Awaitable[Result]],
    nbytes: int,
    window: Window,
    entered: asyncio.Event,
    errors: list[BaseException],
) -> Result:
    """Work on an item as soon as there is room for it, unless one before it has failed; note if it fails itself."""
    try:
        async with window.block(nbytes):
            entered.set()
            try:
                if errors:
                    raise asyncio.CancelledError("the task has ended before this was begun")
                return await work()
            except BaseException as error:
                errors.append(error)
                await window.end()
                raise
    finally:
        entered.set()
