"""Between code that waits for the engine, in a loop of its own, and code that works in threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

# Row functions may wait for what they look up, and parts for an object store.
THREADS = 32
# Python runs one thread at a time. Several that compute would hand its lock around, at every call into pyarrow; the
# stage then takes a third longer for the same rows.
_COMPUTING = ThreadPoolExecutor(1, thread_name_prefix="raylm-compute")
# A local disk takes less than a millisecond for a part, unless it stalls, or is none but a network's, mounted.
QUICK_S = 0.02
CALLS_APART = 100
_END = object()

Item = TypeVar("Item")
Result = TypeVar("Result")


def drained(generator: Callable[[], AsyncGenerator[Item]]) -> Generator[Item]:
    """Yield what an asynchronous generator yields, one by one; see ``gathered``."""
    with closing(gathered(generator, 0.0)) as several:
        for some in several:
            yield from some


def gathered(generator: Callable[[], AsyncGenerator[Item]], period: float) -> Generator[list[Item]]:
    """Yield what an asynchronous generator yields; it runs on in a loop and thread of its own, asked or not.

    When this is closed, that one is, too, and its end is waited for.

    Args:
        generator: makes the generator.
        period: seconds after each yield in which results are gathered; the last ones are not kept so long.
    """
    results: SimpleQueue[Any] = SimpleQueue()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()
    errors: list[BaseException] = []

    async def pump() -> None:
        async with aclosing(generator()) as found:
            async for one in found:
                results.put(one)

    def run() -> None:
        try:
            with asyncio.Runner() as runner:
                loop = runner.get_loop()
                loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="raylm-block"))
                task = loop.create_task(pump())
                running.set_result((loop, task))
                loop.run_until_complete(task)
        except BaseException as error:
            errors.append(error)
        finally:
            results.put(_END)

    thread = Thread(target=run, name="raylm-stage", daemon=True)
    thread.start()
    loop, task = running.result()
    due = time.monotonic()
    try:
        while (one := results.get()) is not _END:
            some = [one]
            with suppress(Empty):
                while (left := due - time.monotonic()) > 0 and (one := results.get(timeout=left)) is not _END:
                    some.append(one)
            yield some
            if one is _END:
                break
            due = time.monotonic() + period
        if errors:
            raise errors[0]
    finally:
        with suppress(RuntimeError):
            # If it has ended, so has its loop.
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


async def computed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a function returns that waits for nothing: in the one thread for all of them, in turn."""
    return await asyncio.get_running_loop().run_in_executor(_COMPUTING, function, *arguments)


class FileCalls:
    """Calls what reads and writes a few files, where that delays the rest least.

    On a local disk it is quick, and done in turn with what computes: another thread that asks for Python's lock at
    every file operation would hold it up for longer. Elsewhere, and for some time after it was not quick here, it has
    a thread of its own.

    Args:
        local: whether the files lie in a folder of this machine.
    """

    def __init__(self, *, local: bool) -> None:
        self._local = local
        self._apart = 0

    async def __call__(self, function: Callable[[], Result]) -> Result:
        """Return what the function returns."""
        if not self._local:
            return await asyncio.to_thread(function)
        if self._apart:
            self._apart -= 1
            return await asyncio.to_thread(function)

        def timed() -> tuple[Result, float]:
            began = time.monotonic()
            return function(), time.monotonic() - began

        result, seconds = await computed(timed)
        if seconds >= QUICK_S:
            self._apart = CALLS_APART
        return result


async def in_threads(items: Iterator[Item]) -> AsyncGenerator[Item]:
    """Yield what an iterator yields, while it is free to wait for files."""
    while (item := await asyncio.to_thread(next, items, _END)) is not _END:
        yield item  # type: ignore[misc]  # mypy does not know that _END is no Item
