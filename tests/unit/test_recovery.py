"""Asking again what an engine failed at, on engines of a few lines."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from airflow_provider_raylm.cluster.batch.recovery import FAILURES_IN_A_ROW, EngineFailure, Recovery
from airflow_provider_raylm.cluster.batch.rows import Answer, Refusal
from airflow_provider_raylm.cluster.gate import Gate
from airflow_provider_raylm.errors import EngineError


class Engine:
    """Answers a row with itself; dies of some rows, and with it every block that is in flight; comes back when asked.

    Attributes:
        deaths: how often it died.
        asked: how many rows it was given.
    """

    def __init__(self, deadly=(), crowd=1):
        self.deadly = set(deadly)
        self.deaths = 0
        self.asked = 0
        self.alive = True
        self.together = threading.Barrier(crowd)
        self.lock = threading.Lock()

    def __call__(self, fields, contents, *, alone):
        with self.lock:
            self.asked += len(contents)
            before = self.deaths
            if self.alive and self.deadly & set(contents):
                self.alive = False
                self.deaths += 1
            dead = not self.alive
        if not alone:
            self.together.wait()
        if dead or self.deaths > before:
            raise EngineFailure("dead")
        return [Answer(content, "stop", 1, 1) for content in contents]

    def wait(self):
        self.alive = True


def rows(first, count=256):
    return [f"row {first + i}" for i in range(count)]


@pytest.mark.parametrize("at", [0, 100, 255])
def test_the_row_at_fault_is_found_and_the_others_are_answered(at):
    """At the price of four deaths: among others, in its block, in its piece, by itself."""
    engine = Engine(deadly=[f"row {at}"])
    outcomes = Recovery(engine, engine.wait)("{}", rows(0))

    assert [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)] == [at]
    assert outcomes[at].reason == "engine_failure"
    assert [o.text for i, o in enumerate(outcomes) if i != at] == [r for i, r in enumerate(rows(0)) if i != at]
    assert engine.deaths == 4


def test_blocks_that_only_died_together_are_asked_once_more():
    """One death for all of them, not one for each."""
    engine = Engine(deadly=["row 300"], crowd=4)
    recovery = Recovery(engine, engine.wait)
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(lambda block: recovery("{}", rows(256 * block)), range(4)))

    refused = [o for block in blocks for o in block if isinstance(o, Refusal)]
    assert len(refused) == 1
    assert engine.deaths == 4
    # Every block twice; the guilty one once more in pieces, and its piece once more by rows.
    assert engine.asked <= 2 * 4 * 256 + 256 + 16


def test_an_engine_that_fails_at_everything_ends_the_task():
    """Instead of refusing every row of the table."""
    engine = Engine(deadly=rows(0))
    with pytest.raises(EngineError, match=f"failed {FAILURES_IN_A_ROW} times without an answer.*dead"):
        Recovery(engine, engine.wait)("{}", rows(0))
    assert engine.deaths == FAILURES_IN_A_ROW


def test_an_engine_that_does_not_come_back_ends_the_task():
    """With the waiter's own words."""

    def wait():
        raise EngineError("not back")

    with pytest.raises(EngineError, match="not back"):
        Recovery(Engine(deadly=["row 0"]), wait)("{}", rows(0))


def test_all_blocks_in_flight_end_for_the_same_reason():
    """However many they are, none waits for the engine anew."""
    crowd = 2 * FAILURES_IN_A_ROW
    engine = Engine(deadly=["row 0"], crowd=crowd)
    waits = []

    def gone():
        waits.append(1)
        raise EngineError("The engine is gone.")

    recovery = Recovery(engine, gone)
    with ThreadPoolExecutor(crowd) as pool:
        blocks = [pool.submit(recovery, "{}", rows(256 * i)) for i in range(crowd)]
    assert {str(block.exception()) for block in blocks} == {"The engine is gone."}
    assert len(waits) == 1


def test_a_block_is_not_blamed_for_a_death_before_its_turn():
    """It waited at the gate when another task's row killed the engine."""
    calls = []

    def ask(fields, contents, *, alone):
        calls.append(alone)
        if len(calls) < 4:
            raise EngineFailure("dead", begun=not alone)
        return [Answer(content, "stop", 1, 1) for content in contents]

    assert len(Recovery(ask, lambda: None)("{}", rows(0, 1))) == 1
    assert calls == [False, True, True, True]


@pytest.mark.asyncio
async def test_the_gate_lets_one_in_alone():
    """Nobody is inside with it, and those who come while it waits do not go before it."""
    gate, log = Gate(), []

    async def go(name, alone):
        async with gate.passed(alone):
            log.append(f"+{name}")
            await asyncio.sleep(0.01)
            log.append(f"-{name}")

    first = [asyncio.create_task(go(name, False)) for name in "ab"]
    await asyncio.sleep(0)
    alone = [asyncio.create_task(go(name, True)) for name in "XY"]
    await asyncio.sleep(0)
    later = [asyncio.create_task(go("c", False))]
    await asyncio.gather(*first, *alone, *later)

    assert log == ["+a", "+b", "-a", "-b", "+X", "-X", "+Y", "-Y", "+c", "-c"]


@pytest.mark.asyncio
async def test_a_cancelled_wait_leaves_the_gate_open():
    """Whether it waited or was inside."""
    gate = Gate()
    inside = asyncio.Event()

    async def go(alone):
        async with gate.passed(alone):
            inside.set()
            await asyncio.sleep(60)

    holder = asyncio.create_task(go(False))
    await inside.wait()
    waiting = asyncio.create_task(go(True))
    await asyncio.sleep(0)
    for task in (waiting, holder):
        task.cancel()
    await asyncio.gather(waiting, holder, return_exceptions=True)

    async with asyncio.timeout(1), gate.passed(alone=True):
        pass
    async with asyncio.timeout(1), gate.passed(alone=False):
        pass
