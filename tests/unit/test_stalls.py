"""When a row in the engine is given up. Time is a clock's."""

import asyncio

import pytest

from airflow_provider_raylm.cluster.replica.stalls import LOOK_PERIOD_S, STALLED_S, STARVED_S, Stalls
from tests.clock import on_a_clock


class Engine:
    """Gives each request a token every so many seconds, from a second on; both None for none at all."""

    def __init__(self, **pace):
        self.pace = pace
        self.stalls = Stalls(self.tokens)

    def tokens(self, request_ids):
        now = asyncio.get_running_loop().time()
        given = {name: pace for name, pace in self.pace.items() if name in request_ids and pace}
        return {name: int(max(now - begins, 0) / seconds) for name, (begins, seconds) in given.items()}

    async def ask(self, name, seconds, timeout=None):
        """Ask for an answer that takes so long; return it, or why there is none."""
        try:
            async with self.stalls.bounded(name, timeout):
                await asyncio.sleep(seconds)
                return "answer"
        except TimeoutError as error:
            return str(error)


def on_an_engine(test, **pace):
    async def run():
        return await test(Engine(**pace))

    return on_a_clock(run())


def test_a_long_answer_is_not_a_late_one():
    """A day of a token every nine minutes."""
    assert on_an_engine(lambda engine: engine.ask("a", 86_400), a=(0, 0.9 * STALLED_S))[0] == "answer"


def test_a_row_without_tokens_ends():
    """Soon after its time, and the text says how long it had none."""
    (said, seconds) = on_an_engine(lambda engine: engine.ask("a", 86_400), a=None)
    assert said.startswith("no token for 6")
    assert STALLED_S < seconds <= STALLED_S + 2 * LOOK_PERIOD_S


def test_a_row_that_stops_ends():
    """Its time begins with its last token."""

    async def stop(engine):
        asking = asyncio.create_task(engine.ask("a", 86_400))
        await asyncio.sleep(1_000)
        tokens = engine.tokens(["a"])
        engine.stalls._tokens = lambda request_ids: tokens
        return await asking

    said, seconds = on_an_engine(stop, a=(0, 1))
    assert said.startswith("no token for")
    assert 1_000 + STALLED_S < seconds <= 1_000 + STALLED_S + 2 * LOOK_PERIOD_S


@pytest.mark.parametrize(("begins", "said"), [(0.9 * STARVED_S, "answer"), (2 * STARVED_S, "no token for 36")])
def test_a_row_waits_as_long_as_others_begin(begins, said):
    """An engine out of memory lets rows wait until others end; but not for ever."""
    pace = {f"other{i}": (i * STALLED_S / 2, 1) for i in range(40)}

    async def wait(engine):
        others = [asyncio.create_task(engine.ask(name, 40 * STALLED_S)) for name in pace]
        outcome = await engine.ask("late", 2.5 * STARVED_S)
        for other in others:
            other.cancel()
        return outcome

    assert on_an_engine(wait, late=(begins, 1), **pace)[0].startswith(said)


def test_the_authors_bound_is_kept():
    """To the second, tokens or not."""
    said, seconds = on_an_engine(lambda engine: engine.ask("a", 86_400, timeout=45), a=(0, 1))
    assert (said, seconds) == ("no answer within 45 s of entering the engine", 45)


def test_looking_survives_a_look_that_fails():
    """The next row is watched again."""

    async def fail(engine):
        engine.stalls._tokens = lambda request_ids: 1 / 0
        await engine.ask("a", 100)
        engine.stalls._tokens = engine.tokens
        return await engine.ask("b", 86_400)

    assert on_an_engine(fail, b=None)[0].startswith("no token for")
