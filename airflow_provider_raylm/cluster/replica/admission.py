"""Which rows are in the engine: as many as it works on and a little more, fair between tasks, or one block alone.

An engine takes whatever it is given into a queue of its own, first come first served. There, a row's time runs while it
waits, a task with few rows stands behind one with many, and whoever is in the queue when the engine dies is a suspect.
So rows wait here instead.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial

from airflow_provider_raylm.errors import EngineError

# An answer travels to us, and the next row to the engine, for this long at most while both are busy:
# so many rows as end in that time wait in the engine itself, so that it never has a place and no row for it.
LEAD_S = 0.5
# Of what it works on, at least this part.
_LEAST_LEAD = 1 / 8
# How many rows end per second is an average over about so long: rows that end together say nothing of the next second.
_RATE_OVER_S = 10.0
# Rows may wait for hours behind others that get their tokens; but no context is so long that an answer takes this long.
WAITING_S = 6 * 3600.0

Enter = Callable[[], AbstractAsyncContextManager[None]]
"""A row is inside while the body runs."""
Door = Callable[[Callable[[], None]], AbstractAsyncContextManager[None]]
"""The same, for the rows of a block; takes what to call when one has entered."""


class Admission:
    """One queue of rows for each task; the task with the fewest rows inside is next.

    Args:
        capacity: rows that the engine works on at a time, at most.
        clock: seconds, as ``time.monotonic``.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = self._works_on = capacity
        self._clock = clock
        self._inside: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        # Blocks that are to be alone, and whose they are; since when one holds others back; until when those are next.
        self._lonely: list[tuple[Hashable, str]] = []
        self._alone_since = self._turn_ends = clock()
        self._end: EngineError | None = None
        self._moved_at = self._began = self._ended_at = clock()
        # Rows that have ended, the older the less they count.
        self._ended = 0.0

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that have rows here, inside or waiting."""
        return sorted(str(one) for one in {*self._inside, *self._waiting} if isinstance(one, str))

    @property
    def rows(self) -> int:
        """Rows inside."""
        return self._inside.total()

    @property
    def ended(self) -> bool:
        """Whether nobody is let in any more."""
        return self._end is not None

    @contextmanager
    def block(self, task: str, alone: bool) -> Iterator[Door]:
        """Yield what the rows of a block enter by; those of a block that is *alone* do when nobody else is inside.

        After it, other tasks have as long as it held them back.
        """
        if not alone:
            yield partial(_Place, self, task)
            return
        # A name of its own, and no task's: it is not one more to be fair to.
        lonely = object(), task
        if not self._lonely:
            self._alone_since = self._clock()
        self._lonely.append(lonely)
        try:
            yield partial(_Place, self, lonely[0])
        finally:
            if lonely == self._lonely[0]:
                now = self._clock()
                self._turn_ends = now + max(now - max(self._alone_since, self._turn_ends), 0.0)
            self._lonely.remove(lonely)
            self._fill()

    async def enter(self, name: Hashable) -> None:
        """Return when a row of that name is inside.

        Raises:
            EngineError: nobody is let in any more.
        """
        self.require_open()
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, deque()).append(ticket)
        self._fill()
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
                # It was let in at the moment at which it was given up.
                self.leave(name)
            elif name in self._waiting:
                self._drop(name, ticket)
            raise

    def _drop(self, name: Hashable, ticket: asyncio.Future[None]) -> None:
        queue = self._waiting[name]
        if ticket in queue:
            queue.remove(ticket)
        if not queue:
            del self._waiting[name]

    def leave(self, name: Hashable) -> None:
        """Give a row's place to the next."""
        self._inside[name] -= 1
        if not self._inside[name]:
            del self._inside[name]
        self._moved_at = now = self._clock()
        self._ended = self._ended * math.exp((self._ended_at - now) / _RATE_OVER_S) + 1
        self._ended_at = now
        self._fill()

    def fit(self, working: int, waiting: int) -> None:
        """Follow what the engine works on: out of memory for long rows, it lets some wait although it has places.

        They would stand in its own queue, before those of all other tasks. So when more of them wait than the engine
        needs at hand, as many may be inside as it works on, and those; until none waits any more.

        Args:
            working: rows inside that have got a token lately, or have entered.
            waiting: the other rows inside.
        """
        if waiting > self._lead() or self._works_on < self._capacity:
            self._works_on = min(working, self._capacity) if waiting else self._capacity
        self._fill()

    def _places(self) -> int:
        """Return how many rows may be inside: what the engine works on, and what keeps it from pausing."""
        return self._works_on + self._lead()

    def _lead(self) -> int:
        seconds = _RATE_OVER_S * -math.expm1((self._began - self._ended_at) / _RATE_OVER_S)
        rate = self._ended / max(seconds, LEAD_S)
        return math.ceil(min(max(rate * LEAD_S, self._capacity * _LEAST_LEAD), self._capacity))

    def _fill(self) -> None:
        places = self._places()
        while self._inside.total() < places and (name := self._next()) is not None:
            queue = self._waiting.pop(name)
            ticket = queue.popleft()
            if queue:
                # At the end: of tasks with equally many rows inside, each is the next in turn.
                self._waiting[name] = queue
            if not ticket.done():
                ticket.set_result(None)
                self._inside[name] += 1
                self._moved_at = self._clock()

    def _next(self) -> Hashable:
        candidates: Collection[Hashable] = self._waiting
        if self._lonely:
            first, task = self._lonely[0]
            candidates = [name for name in self._waiting if isinstance(name, str) and name != task]
            if not candidates or first in self._inside or self._clock() >= self._turn_ends:
                return first if first in self._waiting and self._inside.keys() <= {first} else None
        return min(candidates, key=self._inside.__getitem__, default=None)

    def end(self, error: EngineError) -> None:
        """Let nobody in any more: whoever waits, or comes, gets *error*; the replica is to be replaced."""
        self._end = self._end or error
        for queue in self._waiting.values():
            for ticket in queue:
                if not ticket.done():
                    ticket.set_exception(EngineError(str(self._end)))
        self._waiting.clear()

    def require_open(self) -> None:
        """Return while rows may come, and those that wait have something to wait for.

        Raises:
            EngineError: they may not, or nothing has moved for an hour.
        """
        if self._end is not None:
            raise EngineError(str(self._end))
        if self._inside and (still := self._clock() - self._moved_at) > WAITING_S:
            raise EngineError(f"no row has entered or left the engine for {still:.0f} s")


class _Place:
    """A row's place. A class, because there is one for every row, and a generator takes three times as long."""

    def __init__(self, admission: Admission, name: Hashable, entered: Callable[[], None]) -> None:
        self._admission = admission
        self._name = name
        self._entered = entered

    async def __aenter__(self) -> None:
        await self._admission.enter(self._name)
        self._entered()

    async def __aexit__(self, *_: object) -> None:
        self._admission.leave(self._name)
