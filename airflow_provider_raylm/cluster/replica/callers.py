"""Who waits for answers: what nobody waits for any more is given up, so that the engine is free for others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import ActorDiedError

# After an answer: the caller has done its work and is about to go, or it answers while it works.
LOOK_PERIOD_S = 2.0


class Callers:
    """Cancels the calls of an actor when it dies; Serve would answer them to the end.

    One pending call to each caller tells: an actor that is busy answers it later, and one that has died never.
    """

    def __init__(self) -> None:
        self._calls: dict[Any, set[asyncio.Task[Any]]] = {}
        self._watches: set[asyncio.Task[None]] = set()

    @contextmanager
    def waiting(self, caller: Any) -> Iterator[None]:
        """Cancel the task that runs the body when *caller* dies meanwhile; nobody is watched if it is None."""
        task = asyncio.current_task()
        if caller is None or task is None:
            yield
            return
        calls = self._calls.get(caller)
        if calls is None:
            calls = self._calls[caller] = set()
            watch = asyncio.create_task(self._watch(caller, calls))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        calls.add(task)
        try:
            yield
        finally:
            calls.discard(task)

    async def _watch(self, caller: Any, calls: set[asyncio.Task[Any]]) -> None:
        try:
            while calls:
                # Not to be reached for now, whatever the reason: it may live.
                with suppress(Exception):
                    try:
                        await caller.__ray_ready__.remote()
                    except ActorDiedError:
                        for task in calls:
                            task.cancel()
                        return
                await asyncio.sleep(LOOK_PERIOD_S)
        finally:
            del self._calls[caller]
