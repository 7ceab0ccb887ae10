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


@pytest.mark.parametrize("timeout", [None, 1e6])
def test_a_row_waits_as_long_as_others_get_tokens(timeout):
    """Of 20,000 tokens each, say: none begins or ends for long, and some have to wait for it. Whoever bounds them."""

    async def wait(engine):
        others = [asyncio.create_task(engine.ask(name, 3 * STARVED_S, timeout)) for name in ("a", "b")]
        late = await engine.ask("late", 3.5 * STARVED_S)
        await asyncio.gather(*others)
        return late

    assert on_an_engine(wait, a=(0, 1), b=(0, 1), late=(3.1 * STARVED_S, 1))[0] == "answer"


def test_a_row_waits_as_long_as_others_end():
    """Those that a model reads in one pass get no tokens."""

    async def wait(engine):
        others = [asyncio.create_task(engine.ask(str(i), i * 0.9 * STALLED_S)) for i in range(20)]
        late = await engine.ask("late", 19.5 * 0.9 * STALLED_S)
        await asyncio.gather(*others)
        return late

    assert on_an_engine(wait)[0] == "answer"


@pytest.mark.parametrize(("begins", "said"), [(0.9 * STARVED_S, "answer"), (2 * STARVED_S, "no token for 36")])
def test_a_row_that_is_passed_over_ends(begins, said):
    """When rows that came later begin for an hour, it is stuck: an engine takes them in their order."""
    pace = {f"other{i}": (i * STALLED_S / 2, 1) for i in range(40)}

    async def come(engine, name):
        await asyncio.sleep(pace[name][0])
        await engine.ask(name, STALLED_S)

    async def wait(engine):
        others = [asyncio.create_task(come(engine, name)) for name in pace]
        outcome = await engine.ask("late", 2.5 * STARVED_S)
        for other in others:
            other.cancel()
        return outcome

    assert on_an_engine(wait, late=(begins, 1), **pace)[0].startswith(said)


def test_a_row_ends_when_the_others_have():
    """Nothing moves any more."""

    async def wait(engine):
        other = asyncio.create_task(engine.ask("other", 2 * STALLED_S))
        said = await engine.ask("stuck", 86_400)
        await other
        return said

    said, seconds = on_an_engine(wait, other=(0, 1))
    assert said.startswith("no token for 18")
    assert 3 * STALLED_S < seconds <= 3 * STALLED_S + 2 * LOOK_PERIOD_S


def test_the_authors_bound_is_kept():
    """To the second, tokens or not."""
    said, seconds = on_an_engine(lambda engine: engine.ask("a", 86_400, timeout=45), a=(0, 1))
    assert (said, seconds) == ("no answer within 45 s of entering the engine", 45)


def test_looking_survives_a_look_that_fails(capsys):
    """Said once; and rows that are there already are watched on, the last ones of a task, say."""

    async def fail(engine):
        asking = asyncio.create_task(engine.ask("a", 86_400))
        tokens, engine.stalls._tokens = engine.stalls._tokens, lambda request_ids: 1 / 0
        await asyncio.sleep(100)
        engine.stalls._tokens = tokens
        return await asking

    assert on_an_engine(fail, a=None)[0].startswith("no token for")
    assert capsys.readouterr().out.count("looking for tokens fails") == 1
