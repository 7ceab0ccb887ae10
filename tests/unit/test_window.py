"""How much is in flight at a time, and in which order its results come."""

import asyncio
import threading
import time

import pytest

from airflow_provider_raylm.cluster.batch.loop import CALLS_APART, QUICK_S, FileCalls, drained, gathered, in_threads
from airflow_provider_raylm.cluster.batch.window import Window, in_order
from airflow_provider_raylm.errors import BatchError, EngineError
from tests.clock import on_a_clock


@pytest.mark.parametrize(
    ("chosen", "block_rows", "capacity", "replicas", "rows"),
    [
        (None, 256, 1024, 1, 2048),
        (None, 256, 100, 1, 1536),
        (None, 256, 800, 8, 12_288),
        (None, 256, 50, 0.5, 768),
        (None, 1, 64, 1, 128),
        (20, 7, 1024, 1, 20),
    ],
)
def test_the_window_follows_the_engine(chosen, block_rows, capacity, replicas, rows):
    """Twice what it works on at a time, and enough for an engine to grow by, unless the author says otherwise."""
    window = Window(chosen, block_rows)
    window.fit(capacity, replicas)
    assert window.most_rows == rows


async def each(items):
    for item in items:
        yield item


async def results(work, items, window, nbytes=lambda item: 1):
    return [one async for one in in_order(work, each(items), window, nbytes)]


def test_blocks_come_in_order_while_others_are_worked_on():
    """The first takes longest: the others are done before it, and wait for their turn."""
    finished = []

    async def work(item):
        await asyncio.sleep(100 if item == 0 else 1)
        finished.append(item)
        return item

    assert on_a_clock(results(work, range(6), Window(2, 1)))[0] == [0, 1, 2, 3, 4, 5]
    assert finished == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize(
    ("window", "nbytes", "at_a_time"), [(Window(6, 2), 1, 3), (Window(100, 1, 1000), 300, 3), (Window(9, 1, 10), 11, 1)]
)
def test_no_more_than_the_window_is_begun(window, nbytes, at_a_time):
    """In blocks, and in bytes; one that is larger than all is worked on alone."""
    at_work, most = [], []

    async def work(item):
        at_work.append(item)
        most.append(len(at_work))
        await asyncio.sleep(1)
        at_work.remove(item)

    on_a_clock(results(work, range(50), window, lambda item: nbytes))

    assert max(most) == at_a_time


def test_rows_make_room_as_they_are_answered():
    """A block's last row holds one place, not a block's: with 3 of 4 rows answered at once, 4 blocks go at a time."""
    window = Window(None, 4)
    window.fit(4, 0)
    most = []

    async def engine(question, requests, *, alone, near):
        yield [(number, "early") for number in range(3)]
        most.append(window.most_rows)
        await asyncio.sleep(60)
        yield [(3, "late")]

    async def work(item):
        async for _ in window.metered(engine)("{}", [item] * 4, alone=False, near=None):
            pass

    # Two blocks by their rows; by what is left of them, eight.
    _, seconds = on_a_clock(results(work, range(32), window))
    assert seconds == 60 * 32 / 8


def test_a_window_that_grows_lets_in_who_waits():
    """And one that shrinks takes nothing back."""
    window = Window(None, 1)
    window.fit(2, 0)

    async def engine(question, requests, *, alone, near):
        await asyncio.sleep(10)
        yield [(0, "so")]

    async def work(item):
        async for _ in window.metered(engine)("{}", [item], alone=False, near=None):
            pass

    async def grow():
        await asyncio.sleep(10)
        window.fit(8, 0)
        await window.tell()

    async def both():
        await asyncio.gather(results(work, range(68), window), grow())

    assert on_a_clock(both())[1] == 10 + 10 * 64 / 16


def test_work_goes_on_while_nobody_asks_for_results():
    """The consumer may take its time; the engine must not wait for it."""
    finished = []

    async def work(item):
        finished.append(item)
        return item

    async def ask_once():
        found = in_order(work, each(range(20)), Window(2, 1), lambda item: 1)
        first = await anext(found)
        await asyncio.sleep(1)
        assert len(finished) == 20
        return [first] + [one async for one in found]

    assert on_a_clock(ask_once())[0] == list(range(20))


def test_an_error_of_the_source_comes_after_what_it_gave():
    """A file that cannot be read in the middle fails the task; the blocks before it are written."""
    finished = []

    async def items():
        for item in range(3):
            yield item
        raise BatchError("cannot read")

    async def work(item):
        finished.append(item)

    async def run():
        with pytest.raises(BatchError, match="cannot read"):
            [one async for one in in_order(work, items(), Window(2, 1), lambda item: 1)]

    on_a_clock(run())
    assert sorted(finished) == [0, 1, 2]


def test_the_first_error_ends_it():
    """Nothing more is begun or asked; what has been asked is finished, for its answers are paid."""
    begun, asked, finished = [], [], []
    window = Window(None, 1)
    window.fit(1, 0)

    async def engine(question, requests, *, alone, near):
        asked.append(requests[0])
        await asyncio.sleep(1 + requests[0])
        if requests[0] == 0:
            raise EngineError("gone")
        yield [(0, "so")]

    async def work(item):
        begun.append(item)
        async for _ in window.metered(engine)("{}", [item], alone=False, near=None):
            pass
        finished.append(item)

    async def run():
        with pytest.raises(EngineError, match="gone"):
            await results(work, range(1000), window)

    on_a_clock(run())
    assert asked == [0, 1]
    assert finished == [1]
    assert len(begun) <= 8


def test_a_generator_of_a_loop_is_drained_in_a_thread():
    """With its results, its error, and its end when it is closed early."""
    closed = []

    async def numbers(last, error=None):
        try:
            async for item in in_threads(iter(range(last))):
                yield item
            if error:
                raise error
        finally:
            await asyncio.sleep(0)
            closed.append(last)

    assert list(drained(lambda: numbers(3))) == [0, 1, 2]
    with pytest.raises(BatchError, match="unreadable"):
        list(drained(lambda: numbers(2, BatchError("unreadable"))))
    early = drained(lambda: numbers(10**9))
    assert next(early) == 0
    early.close()
    assert closed == [3, 2, 10**9]


def test_results_that_come_close_together_are_yielded_together():
    """The first and the last ones at once."""

    async def numbers():
        for number in range(4):
            await asyncio.sleep(0)
            yield number

    began = time.monotonic()
    assert list(gathered(numbers, 60.0)) == [[0], [1, 2, 3]]
    assert time.monotonic() - began < 30


def test_files_of_this_machine_are_written_in_turn_until_one_stalls():
    """A stall may be a network's, mounted: what comes then must not wait for it."""

    def thread(seconds=0.0):
        time.sleep(seconds)
        return threading.current_thread().name

    async def called(calls, times, seconds=0.0):
        return {await calls(lambda: thread(seconds)) for _ in range(times)}

    async def run():
        here, elsewhere = FileCalls(local=True), FileCalls(local=False)
        in_turn = await called(here, 3)
        assert len(in_turn) == 1
        assert in_turn.isdisjoint(await called(elsewhere, 3))
        await called(here, 1, 2 * QUICK_S)
        assert in_turn.isdisjoint(await called(here, CALLS_APART))
        assert await called(here, 3) == in_turn

    asyncio.run(run())
