"""How many blocks are on their way at a time, and in which order their results come."""

import threading
import time

import pytest

from airflow_provider_raylm.cluster.batch.window import in_order, window
from airflow_provider_raylm.errors import BatchError, EngineError


@pytest.mark.parametrize(
    ("chosen", "block_rows", "capacity", "blocks"),
    [(None, 256, 1024, 8), (None, 256, 100, 4), (None, 1, 64, 128), (20, 7, 1024, 3), (1, 256, 1024, 1)],
)
def test_the_window_follows_the_engine(chosen, block_rows, capacity, blocks):
    """Twice what it works on at a time, unless the author says otherwise."""
    assert window(chosen, block_rows, capacity) == blocks


def test_blocks_come_in_order_while_others_are_worked_on():
    """The first takes longest: the others are done before it, and wait for their turn."""
    finished = []
    first_may_end = threading.Event()

    def work(item):
        if item == 0:
            assert first_may_end.wait(10)
        finished.append(item)
        if item == 3:
            first_may_end.set()
        return item

    assert list(in_order(work, range(6), at_a_time=2)) == [0, 1, 2, 3, 4, 5]
    assert finished[:3] == [1, 2, 3]


def test_no_more_than_the_window_is_begun():
    """What is begun and not done is what a crash can lose."""
    at_work = []
    most = []

    def work(item):
        at_work.append(item)
        most.append(len(at_work))
        time.sleep(0.002)
        at_work.remove(item)

    list(in_order(work, range(50), at_a_time=3))

    assert max(most) == 3


def test_work_goes_on_while_nobody_asks_for_results():
    """The consumer may take its time; the engine must not wait for it."""
    finished = threading.Semaphore(0)

    def work(item):
        finished.release()
        return item

    results = in_order(work, range(20), at_a_time=2)
    assert next(results) == 0
    assert all(finished.acquire(timeout=10) for _ in range(20))
    assert list(results) == list(range(1, 20))


def test_an_error_of_the_source_comes_after_what_it_gave():
    """A file that cannot be read in the middle fails the task; the blocks before it are written."""
    finished = []

    def items():
        yield from range(3)
        raise BatchError("cannot read")

    with pytest.raises(BatchError, match="cannot read"):
        list(in_order(finished.append, items(), at_a_time=2))

    assert sorted(finished) == [0, 1, 2]


def test_the_first_error_ends_it():
    """Nothing more is begun, what has been begun is finished."""
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise EngineError("gone")

    with pytest.raises(EngineError, match="gone"):
        list(in_order(work, range(1000), at_a_time=2))

    assert len(begun) < 10
