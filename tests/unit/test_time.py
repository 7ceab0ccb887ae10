"""Hours of work on several replicas, with deaths, growth and neighbours: what it costs, and that nothing is lost."""

import asyncio
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal
from airflow_provider_raylm.cluster.replica import serving
from tests.scripted_replicas import RESTART_S, WAVE_S, blocks, crash, on_replicas


@pytest.fixture(autouse=True, scope="module")
def seldom():
    """Fewer signs of life, of which hours have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "PART_PERIOD_S", 10.0)
        yield


def assert_all_answered(asked, outcomes):
    assert [[o.value for o in block] for block in outcomes] == [[str(seconds) for seconds in block] for block in asked]


def test_a_crash_costs_the_restart_and_a_wave():
    """With forty blocks to ask, six of them in flight: nothing waits for what it has nothing to do with."""

    _, without, _ = on_replicas(lambda engine: engine.task("t", blocks(40)))
    outcomes, seconds, engine = on_replicas(lambda engine: crash(engine, 40, 10.5, 0))
    assert_all_answered(blocks(40), outcomes)
    assert engine.deaths == 1
    assert without == pytest.approx(40 * WAVE_S, rel=0.02)
    assert seconds - without <= RESTART_S + WAVE_S + 15
    assert seconds <= 1.25 * without


def test_a_crash_of_one_replica_holds_no_other_up():
    """Seven go on; what was lost is asked there."""

    outcomes, seconds, _ = on_replicas(lambda engine: crash(engine, 320, 20.5, 3), count=8)
    assert_all_answered(blocks(320), outcomes)
    # An eighth of the engine is away for a while, and has lost half a wave; the end is as uneven as ever.
    assert seconds <= (40 + 2) * WAVE_S


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_replicas_are_kept_busy(count):
    """Twice as many answer twice as fast, whatever the lengths."""
    chance = random.Random(count)
    lengths = [[chance.expovariate(1 / 60) for _ in range(32)] for _ in range(40 * count)]
    _, seconds, _ = on_replicas(lambda engine: engine.task("t", lengths), count=count)
    ideal = sum(map(sum, lengths)) / (32 * count)
    assert seconds <= ideal / 0.95 + max(map(max, lengths))


def test_a_small_task_beside_a_large_one_has_half_the_engine():
    """Of unequal size, and unequal lengths."""

    async def both(engine):
        large = asyncio.create_task(engine.task("large", blocks(60, seconds=WAVE_S)))
        await asyncio.sleep(3.3 * WAVE_S)
        began = asyncio.get_running_loop().time()
        await engine.task("small", blocks(4, seconds=30.0))
        seconds = asyncio.get_running_loop().time() - began
        await large
        return seconds

    seconds, together, _ = on_replicas(both)
    # Four blocks at two blocks' time each, and at most a wave until half of the places are its own.
    assert seconds <= 1.5 * 8 * 30 + WAVE_S
    assert together <= (60 * WAVE_S + 4 * 30) * 1.03 + WAVE_S


def test_an_engine_that_grows_gets_more_to_do():
    """From one replica to four, after ten waves."""

    async def grow(engine):
        task = asyncio.create_task(engine.task("t", blocks(130)))
        await asyncio.sleep(10 * WAVE_S)
        for _ in range(3):
            engine.add()
        return await task

    _, seconds, _ = on_replicas(grow)
    assert seconds <= (10 + 120 / 4 + 3) * WAVE_S


def test_an_engine_that_shrinks_loses_nothing():
    """Its replica has the time that its rows need; and where it has not, no row is under suspicion for it."""

    async def shrink(engine):
        task = asyncio.create_task(engine.task("t", blocks(80)))
        for _ in range(3):
            await asyncio.sleep(3.5 * WAVE_S)
            engine.remove(grace=0.25 * WAVE_S)
        return await task

    outcomes, seconds, engine = on_replicas(shrink, count=4)
    assert_all_answered(blocks(80), outcomes)
    assert engine.deaths == 0
    assert seconds <= 1.25 * (3.5 * WAVE_S * 3 + (80 - 14 - 10 - 7) * WAVE_S)


@dataclass
class Harm:
    """What happens while tasks work: deaths, growth and shrinking, each at a second."""

    crashes: list[float]
    growth: list[float]
    shrinking: list[float]

    def begin(self, engine, chance):
        """Do it all in time; return the tasks that wait for it."""

        def crash():
            if engine.running:
                chance.choice(engine.running).died.set()

        def shrink():
            if len(engine.running) > 1:
                engine.remove(grace=20.0)

        async def later(at, act):
            await asyncio.sleep(at)
            act()

        acts = [(self.crashes, crash), (self.growth, engine.add), (self.shrinking, shrink)]
        return [asyncio.create_task(later(at, act)) for times, act in acts for at in times]


SECONDS = st.lists(st.floats(1, 2_000), max_size=3)


def assert_right(asked, answered, at_fault):
    """Each row has its own answer, or is at fault."""
    for block, (lengths, outcomes) in enumerate(zip(asked, answered, strict=True)):
        for row, (length, outcome) in enumerate(zip(lengths, outcomes, strict=True)):
            if (block, row) in at_fault:
                assert isinstance(outcome, Refusal)
                assert outcome.reason == "engine_failure"
            else:
                assert outcome == Answer(str(length), "stop", 1, 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    poison=st.integers(0, 2),
    harm=st.builds(Harm, SECONDS, SECONDS, SECONDS),
)
def test_every_row_ends_once_and_no_healthy_one_is_refused(seed, count, sizes, poison, harm):
    """Whatever dies, grows, shrinks and is asked side by side, and in a time that can be told."""
    chance = random.Random(seed)
    tasks = [[[chance.expovariate(1 / 40) for _ in range(16)] for _ in range(size)] for size in sizes]
    at_fault = set(chance.sample([(block, row) for block in range(sizes[0]) for row in range(16)], poison))
    for block, row in at_fault:
        tasks[0][block][row] = -1.0

    async def run(engine):
        harming = harm.begin(engine, chance)
        try:
            return await asyncio.gather(*(engine.task(str(name), blocks) for name, blocks in enumerate(tasks)))
        finally:
            for one in harming:
                one.cancel()

    outcomes, seconds, engine = on_replicas(run, count=count, capacity=16)
    assert_right(tasks[0], outcomes[0], at_fault)
    for asked, answered in zip(tasks[1:], outcomes[1:], strict=True):
        assert_right(asked, answered, set())
    everything = [length for blocks in tasks for block in blocks for length in block]
    work, longest = sum(map(abs, everything)), max(everything)
    # A death costs a restart and what was in the engine; what dies twice has an engine of its own for a while.
    alone = 0 if engine.deaths < 2 else engine.deaths * 18 * longest
    assert seconds <= work / 16 + longest + engine.deaths * (RESTART_S + 2 * longest) + alone + 60
