"""Asking again what an engine failed at, on engines of a few lines."""

import asyncio

import pytest

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.batch.recovery import FAILURES_IN_A_ROW, UNBEGUN_IN_A_ROW, EngineFailure, Recovery
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
        self.together = asyncio.Barrier(crowd)

    async def __call__(self, question, requests, *, alone, near):
        self.asked += len(requests)
        before = self.deaths
        if self.alive and self.deadly & set(requests):
            self.alive = False
            self.deaths += 1
        dead = not self.alive
        if not alone:
            await self.together.wait()
        if dead or self.deaths > before:
            raise EngineFailure("dead")
        yield [(number, Answer(content, "stop", 1, 1)) for number, content in enumerate(requests)]

    async def wait(self):
        self.alive = True


def rows(first, count=256):
    return [f"row {first + i}" for i in range(count)]


@pytest.mark.parametrize("at", [0, 100, 255])
async def test_the_row_at_fault_is_found_and_the_others_are_answered(at):
    """At the price of six deaths: twice among others, in its block, in its piece, twice by itself."""
    engine = Engine(deadly=[f"row {at}"])
    outcomes = await Recovery(engine, engine.wait)("{}", rows(0))

    assert [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Refusal)] == [at]
    assert outcomes[at].reason == "engine_failure"
    assert [o.value for i, o in enumerate(outcomes) if i != at] == [r for i, r in enumerate(rows(0)) if i != at]
    assert engine.deaths == 6


async def test_blocks_that_only_died_together_are_asked_again_together():
    """One death for all of them, not one for each; and alone only when they have died twice."""
    engine = Engine(deadly=["row 300"], crowd=4)
    recovery = Recovery(engine, engine.wait)
    blocks = await asyncio.gather(*(recovery("{}", rows(256 * block)) for block in range(4)))

    refused = [o for block in blocks for o in block if isinstance(o, Refusal)]
    assert len(refused) == 1
    assert engine.deaths == 6
    # Every block three times; the guilty one once more in pieces, and its piece once more by rows.
    assert engine.asked <= 3 * 4 * 256 + 256 + 16 + 1


async def test_an_engine_that_fails_at_everything_ends_the_task():
    """Instead of refusing every row of the table."""
    engine = Engine(deadly=rows(0))
    with pytest.raises(EngineError, match=f"failed {FAILURES_IN_A_ROW} times without an answer.*dead"):
        await Recovery(engine, engine.wait)("{}", rows(0))
    assert engine.deaths == FAILURES_IN_A_ROW


async def test_an_engine_that_does_not_come_back_ends_the_task():
    """With the waiter's own words."""

    async def wait():
        raise EngineError("not back")

    with pytest.raises(EngineError, match="not back"):
        await Recovery(Engine(deadly=["row 0"]), wait)("{}", rows(0))


async def test_all_blocks_in_flight_end_for_the_same_reason():
    """However many they are, none waits for the engine anew."""
    crowd = 2 * FAILURES_IN_A_ROW
    engine = Engine(deadly=["row 0"], crowd=crowd)
    waits = []

    async def gone():
        waits.append(1)
        raise EngineError("The engine is gone.")

    recovery = Recovery(engine, gone)
    blocks = await asyncio.gather(*(recovery("{}", rows(256 * i)) for i in range(crowd)), return_exceptions=True)
    assert set(map(str, blocks)) == {"The engine is gone."}
    assert len(waits) == 1


class Script:
    """Fails as it is told, one failure per call, after some answers; then answers all.

    Attributes:
        calls: of each call, whether it was alone, and what it asked about.
    """

    def __init__(self, *failures, answers=0):
        self.failures = list(failures)
        self.answers = answers
        self.calls = []

    async def __call__(self, question, requests, *, alone, near):
        self.calls.append((alone, list(requests)))
        answered = [(number, Answer(content, "stop", 1, 1)) for number, content in enumerate(requests)]
        if self.failures:
            yield answered[: self.answers]
            raise self.failures.pop(0)
        yield answered


async def wait():
    """Come back at once."""


async def test_what_waited_is_not_blamed():
    """For a death before its rows had entered the engine, among others or alone."""
    waited, was_inside = EngineFailure("dead", begun=False), EngineFailure("dead", begun=True)
    ask = Script(waited, waited, waited, was_inside, waited, was_inside, waited, waited)

    assert len(await Recovery(ask, wait)("{}", rows(0, 1))) == 1
    assert [alone for alone, _ in ask.calls] == [False] * 6 + [True] * 3


async def test_what_was_answered_before_a_death_is_not_asked_again():
    """It is paid."""
    ask = Script(*[EngineFailure("dead")] * 2, answers=3)
    outcomes = await Recovery(ask, wait)("{}", rows(0, 10))

    assert [asked for _, asked in ask.calls] == [rows(0, 10), rows(3, 7), rows(6, 4)]
    assert [outcome.value for outcome in outcomes] == rows(0, 10)


async def test_a_lost_answer_is_noticed():
    """Never a row without its answer."""

    async def ask(question, requests, *, alone, near):
        yield [(0, Answer("a", "stop", 1, 1))]

    with pytest.raises(EngineError, match="1 of 2 rows"):
        await Recovery(ask, wait)("{}", ["a", "b"])


async def test_an_engine_that_dies_before_it_begins_is_not_asked_for_ever():
    """Whatever kills it, it never gets to work."""
    ask = Script(*[EngineFailure("dead", begun=False)] * 100)
    with pytest.raises(EngineError, match=f"failed {UNBEGUN_IN_A_ROW} times"):
        await Recovery(ask, wait)("{}", ["a"])
