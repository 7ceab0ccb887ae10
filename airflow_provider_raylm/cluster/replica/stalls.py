"""When a row in the engine is given up: by the author's bound, or when it gets no tokens any more.

A long answer is not a late one. Without a bound of the author's, a row may take hours as long as tokens come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

LOOK_PERIOD_S = 10.0
# Without a token, while no other row got one or ended either. In a full engine, or one out of memory, some rows wait
# until others end, which may write for hours.
STALLED_S = 600.0
# Without a token, while rows that came later have begun: an engine takes rows in their order, but for those that wait
# for an adapter or a grammar.
STARVED_S = 3600.0

Tokens = Callable[[Collection[str]], Mapping[str, int]]
"""Returns by request id how many tokens each has got; an id that it leaves out has got none."""
Fit = Callable[[int, int], object]
"""Is told how many rows the engine works on, and how many wait in it: those without a token since the last look."""


@dataclass
class _Row:
    """A row in the engine.

    Attributes:
        bound: ends it.
        entered: when it did.
        since: when it got its last token, or entered.
        watched: whether tokens are its only bound.
        tokens: how many it has got.
    """

    bound: asyncio.Timeout
    entered: float
    since: float
    watched: bool
    tokens: int = 0


class Stalls:
    """Watches rows for their tokens.

    Args:
        tokens: says how many each row has got.
        fit: is told at every look; not while the engine pauses.
    """

    def __init__(self, tokens: Tokens, fit: Fit = lambda working, waiting: None) -> None:
        self._tokens = tokens
        self._fit = fit
        self._rows: dict[str, _Row] = {}
        self._looking: asyncio.Task[None] | None = None
        self._trouble = ""
        # When a row last got a token or ended, and when the last to come of those that have begun entered.
        self._moved_at = 0.0
        self._newest_begun = 0.0

    @asynccontextmanager
    async def bounded(self, request_id: str, timeout: float | None) -> AsyncIterator[None]:
        """Bound what the body, which asks for one row, may take.

        Args:
            request_id: the engine's name of it.
            timeout: seconds, or None: for as long as tokens come.

        Raises:
            TimeoutError: it took longer; the text says how long.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        try:
            async with asyncio.timeout(timeout) as bound:
                row = self._rows[request_id] = _Row(bound, now, now, watched=timeout is None)
                if self._looking is None or self._looking.done():
                    self._looking = asyncio.create_task(self._look())
                yield
                self._moved(row, loop.time())
        except TimeoutError:
            if timeout is not None:
                raise TimeoutError(f"no answer within {timeout:g} s of entering the engine") from None
            raise TimeoutError(f"no token for {loop.time() - row.since:.0f} s") from None
        finally:
            self._rows.pop(request_id, None)

    def _moved(self, row: _Row, now: float) -> None:
        self._moved_at = now
        self._newest_begun = max(self._newest_begun, row.entered)

    async def _look(self) -> None:
        while self._rows:
            await asyncio.sleep(LOOK_PERIOD_S)
            try:
                self.look(asyncio.get_running_loop().time())
                self._trouble = ""
            except Exception as error:  # The rows have no other bound.
                trouble, self._trouble = self._trouble, type(error).__name__
                if trouble != self._trouble:
                    print(f"raylm: looking for tokens fails, and is tried again: {error!r}", flush=True)

    def look(self, now: float) -> None:
        """Note which rows have got tokens, and end those that have waited too long for one."""
        counts = self._tokens(self._rows.keys())
        for request_id, row in self._rows.items():
            if (count := counts.get(request_id, 0)) > row.tokens:
                row.tokens, row.since = count, now
                self._moved(row, now)
        for row in self._rows.values():
            passed_over = self._newest_begun > row.since + LOOK_PERIOD_S
            late = now - max(row.since, self._moved_at) > STALLED_S or (passed_over and now - row.since > STARVED_S)
            if row.watched and late and not row.bound.expired():
                row.bound.reschedule(now)
        if now - self._moved_at <= LOOK_PERIOD_S:
            waiting = sum(now - row.since > LOOK_PERIOD_S for row in self._rows.values())
            self._fit(len(self._rows) - waiting, waiting)
