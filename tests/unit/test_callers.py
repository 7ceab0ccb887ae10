"""Callers that die while a replica works for them."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RaySystemError

from airflow_provider_raylm.cluster.replica import callers
from airflow_provider_raylm.cluster.replica.callers import Callers


class Caller:
    """An actor that answers each look after some seconds, or raises then; after that it is busy for good."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0
        self.__ray_ready__ = self

    async def remote(self):
        self.asked += 1
        seconds, error = self.answers.pop(0) if self.answers else (3600, None)
        await asyncio.sleep(seconds)
        if error is not None:
            raise error


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(callers, "LOOK_PERIOD_S", 0.001)


async def call(waited, caller, ends):
    with waited.waiting(caller):
        await ends.wait()
        return "answered"


async def outcomes(*callers_):
    """Return how a call of each caller ends, when those are let go on that have not been cancelled after a while."""
    waited, ends = Callers(), asyncio.Event()
    calls = [asyncio.create_task(call(waited, caller, ends)) for caller in callers_]
    await asyncio.sleep(0.05)
    ends.set()
    return waited, await asyncio.gather(*calls, return_exceptions=True)


def test_all_calls_of_one_that_died_are_given_up():
    """And no call of another, nor one of nobody in particular; one look-out serves all calls of a caller."""
    dead, alive = Caller((0.01, ActorDiedError())), Caller()
    _, (first, second, *others) = asyncio.run(outcomes(dead, dead, alive, None))

    assert isinstance(first, asyncio.CancelledError)
    assert isinstance(second, asyncio.CancelledError)
    assert others == ["answered", "answered"]
    assert (dead.asked, alive.asked) == (1, 1)


@pytest.mark.parametrize("silent", [ActorUnavailableError("no answer", b"0" * 16), RaySystemError("out of order")])
def test_one_that_cannot_be_reached_is_asked_again(silent):
    """It may live, or die later."""
    caller, late = Caller((0, silent), (0, silent)), Caller((0, silent), (0, ActorDiedError()))
    _, (answered, given_up) = asyncio.run(outcomes(caller, late))

    assert answered == "answered"
    assert caller.asked == 3
    assert isinstance(given_up, asyncio.CancelledError)


def test_nobody_is_watched_when_there_is_nothing_to_wait_for():
    """One that answers, for it is done, is asked again only while it waits for something."""

    async def scenario():
        caller = Caller(*[(0.02, None)] * 9)
        waited, ended = await outcomes(caller)
        await asyncio.sleep(0.1)
        return ended, waited._calls, caller.asked

    ended, watched, asked = asyncio.run(scenario())
    assert ended == ["answered"]
    assert watched == {}
    assert asked < 9
