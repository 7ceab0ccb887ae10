"""Who may be in the engine: many at a time, or one alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets many in at a time, or one alone.

    Whoever wants to be alone waits for those inside; those who come later wait for them.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def passed(self, alone: bool) -> AsyncIterator[None]:
        """Be inside for as long as the body runs."""
        self._alone += alone
        try:
            while self._inside if alone else self._alone:
                await self._changed.wait()
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
        finally:
            self._alone -= alone
            self._changed.set()
            self._changed = asyncio.Event()
