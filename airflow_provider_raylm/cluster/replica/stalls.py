"""When a row in the engine is given up: by the author's bound, or when it gets no tokens any more.

A long answer is not a late one. Without a bound of the author's, a row may take hours as long as tokens come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

LOOK_PERIOD_S = 10.0
# Without a token, while no other row began either: an engine out of memory for more rows lets some wait until others
# end, and as long as rows begin, it is only not this one's turn.
STALLED_S = 600.0
# Without a token, whatever the others get.
STARVED_S = 3600.0

Tokens = Callable[[Collection[str]], Mapping[str, int]]
"""Returns by request id how many tokens each has got; an id that it leaves out has got none."""


@dataclass
class _Row:
    bound: asyncio.Timeout
    since: float
    tokens: int = 0


class Stalls:
    """Watches rows for their tokens.

    Args:
        tokens: says how many each row has got.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._rows: dict[str, _Row] = {}
        self._looking: asyncio.Task[None] | None = None
        self._began_at = 0.0

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
        row = None
        try:
            async with asyncio.timeout(timeout) as bound:
                if timeout is None:
                    row = self._rows[request_id] = _Row(bound, loop.time())
                    if self._looking is None or self._looking.done():
                        self._looking = asyncio.create_task(self._look())
                yield
        except TimeoutError:
            if row is None:
                raise TimeoutError(f"no answer within {timeout:g} s of entering the engine") from None
            raise TimeoutError(f"no token for {loop.time() - row.since:.0f} s") from None
        finally:
            self._rows.pop(request_id, None)

    async def _look(self) -> None:
        while self._rows:
            await asyncio.sleep(LOOK_PERIOD_S)
            self.look(asyncio.get_running_loop().time())

    def look(self, now: float) -> None:
        """Note which rows have got tokens, and end those that have waited too long for one."""
        counts = self._tokens(self._rows.keys())
        for request_id, row in self._rows.items():
            if (count := counts.get(request_id, 0)) > row.tokens:
                if not row.tokens:
                    self._began_at = now
                row.tokens, row.since = count, now
        for row in self._rows.values():
            late = now - max(row.since, self._began_at) > STALLED_S or now - row.since > STARVED_S
            if late and not row.bound.expired():
                row.bound.reschedule(now)
