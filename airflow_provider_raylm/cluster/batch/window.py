"""How many blocks are on their way at a time, and how they stay so many. No Ray, no vLLM."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from typing import TypeVar

LEAST_BLOCKS_IN_FLIGHT = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def window(in_flight_rows: int | None, block_rows: int, capacity: int) -> int:
    """Return how many blocks may be on their way at a time.

    By default twice what the engine works on at a time: while one half is worked on the other waits in the engine's
    own queue, so that the way there and back is never waited for; more would only wait longer. Few big blocks end
    together and would drain the engine, so there are at least four.

    Args:
        in_flight_rows: the author's own choice in rows, or None.
        block_rows: rows per block.
        capacity: requests that all replicas work on at a time.
    """
    if in_flight_rows is not None:
        return math.ceil(in_flight_rows / block_rows)
    return max(math.ceil(2 * capacity / block_rows), LEAST_BLOCKS_IN_FLIGHT)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], at_a_time: int) -> Generator[Result]:
    """Yield ``work(item)`` for all items in their order, while up to *at_a_time* are being worked on.

    Items are taken and worked on whether or not the caller asks for the next result: Ray Data asks when it has dealt
    with the last one, and the engine would be idle until then. A slow item delays only what is yielded. The first error
    ends it: what has been begun is finished, nothing more is begun.
    """
    begun: Queue[Future[Result] | None] = Queue()
    free = threading.Semaphore(at_a_time)
    over = threading.Event()

    def done(future: Future[Result]) -> None:
        if future.exception() is not None:
            over.set()
        free.release()

    def feed() -> None:
        try:
            for item in items:
                free.acquire()
                if over.is_set():
                    break
                future = pool.submit(work, item)
                future.add_done_callback(done)
                begun.put(future)
        finally:
            begun.put(None)

    with ThreadPoolExecutor(at_a_time + 1, thread_name_prefix="raylm-block") as pool:
        feeding = pool.submit(feed)
        try:
            while (future := begun.get()) is not None:
                yield future.result()
            feeding.result()
        finally:
            over.set()
