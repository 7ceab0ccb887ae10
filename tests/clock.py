"""An event loop whose time passes when nothing else is to be done: hours in milliseconds, and always the same."""

import asyncio
import selectors
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any


class _Leap(selectors.SelectSelector):
    """Instead of waiting for *timeout*, lets it pass."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise AssertionError("everybody waits for something that nobody does")
        self.now += max(timeout, 0.0)
        return []


class ClockLoop(asyncio.SelectorEventLoop):
    """Runs what would go to a thread at once."""

    def __init__(self) -> None:
        self._leap = _Leap()
        super().__init__(self._leap)

    def time(self) -> float:
        return self._leap.now

    def run_in_executor(self, executor: Any, function: Any, *args: Any) -> Any:  # type: ignore[override]
        done: Future[Any] = Future()
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)
        return asyncio.wrap_future(done, loop=self)


def on_a_clock(coroutine: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
    """Run *coroutine*; return its result, and how many seconds passed on the clock."""
    loop = ClockLoop()
    try:
        asyncio.set_event_loop(loop)
        result = loop.run_until_complete(coroutine)
        return result, loop.time()
    finally:
        asyncio.set_event_loop(None)
        loop.close()
