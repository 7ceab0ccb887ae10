"""Which rows are in the engine, and what a replica says of its blocks meanwhile. Time is a clock's."""

import asyncio
from collections import Counter
from contextlib import suppress
from functools import partial

import pytest

from airflow_provider_raylm.cluster.batch.exchange import Answer
from airflow_provider_raylm.cluster.replica.admission import WAITING_S, Admission
from airflow_provider_raylm.cluster.replica.serving import GIVE_WAY_S, in_parts
from airflow_provider_raylm.cluster.replica.stalls import LOOK_PERIOD_S, Stalls
from airflow_provider_raylm.errors import EngineError
from tests.clock import on_a_clock


class Replica:
    """An engine that takes each row for as many seconds as its content says.

    Attributes:
        inside: contents of the rows in the engine.
        most: how many there were at a time.
        log: what entered and left, in order.
    """

    def __init__(self, capacity):
        self.admission = Admission(capacity, asyncio.get_running_loop().time)
        self.inside = []
        self.most = 0
        self.log = []

    def row(self, seconds, name=""):
        async def work(enter):
            async with enter():
                self.inside.append(name)
                self.most = max(self.most, len(self.inside))
                self.log.append(f"+{name}")
                await asyncio.sleep(seconds)
                self.inside.remove(name)
                self.log.append(f"-{name}")
                return Answer(name, "stop", 1, 1)

        return work

    async def answer(self, task, seconds, names=("",), alone=False):
        """Answer rows of a task, each in as many seconds; return the parts."""
        with self.admission.block(task, alone) as enter:
            rows = [self.row(seconds, name) for name in names]
            return [part async for part in in_parts("r", rows, self.admission, enter)]


def on_a_replica(capacity, test):
    async def run():
        return await test(Replica(capacity))

    return on_a_clock(run())


def test_rows_enter_as_places_get_free():
    """What the engine works on, and an eighth: long rows wait here and not there."""

    async def test(replica):
        await replica.answer("t", 60, [str(i) for i in range(64 * 4)])
        return replica.most

    most, seconds = on_a_replica(64, test)
    assert 64 < most <= 64 + 64 / 8 + 4
    assert seconds <= 60 * 4


def test_an_engine_of_short_rows_is_given_more_ahead():
    """What ends while an answer and the next row are in flight: half a second's rows, and never twice its size."""

    async def test(replica):
        await replica.answer("t", 0.1, [str(i) for i in range(64 * 200)])
        return replica.most

    most, _ = on_a_replica(64, test)
    assert most == 128


def test_tasks_share_the_engine_whatever_they_ask():
    """A small task beside a large one has half the places, not its share of the queue."""

    async def test(replica):
        large = asyncio.create_task(replica.answer("large", 10, ["l"] * 1_000))
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        await replica.answer("small", 10, ["s"] * 50)
        large.cancel()
        return asyncio.get_running_loop().time() - began

    seconds, _ = on_a_replica(10, test)
    # By itself, with half the engine: ten rounds.
    assert seconds <= 1.5 * 10 * 10


def test_a_block_alone_is_alone():
    """Nobody is inside with it, and those who come while it waits do not go before it."""

    async def test(replica):
        first = [asyncio.create_task(replica.answer("t", 10, [name])) for name in "ab"]
        await asyncio.sleep(1)
        alone = [asyncio.create_task(replica.answer("t", 10, [name, name], alone=True)) for name in "XY"]
        await asyncio.sleep(1)
        later = [asyncio.create_task(replica.answer("t", 10, ["c"]))]
        await asyncio.gather(*first, *alone, *later)
        return " ".join(replica.log)

    assert on_a_replica(64, test)[0] == "+a +b -a -b +X +X -X -X +Y +Y -Y -Y +c -c"


def test_blocks_alone_leave_half_the_time_to_other_tasks():
    """A task whose blocks have all failed twice has many of them, one after the other; nobody is with any of them."""

    async def test(replica):
        alone = [asyncio.create_task(replica.answer("a", 10, ["X"] * 4, alone=True)) for _ in range(20)]
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        await replica.answer("b", 10, ["c"] * 80)
        seconds = asyncio.get_running_loop().time() - began
        await asyncio.gather(*alone)
        return seconds, asyncio.get_running_loop().time(), "".join(replica.log)

    seconds, all_seconds, log = on_a_replica(8, test)[0]
    # Nine at a time, ten seconds each, and as long for the blocks in between.
    assert seconds <= 1.5 * 2 * 80 / 9 * 10
    assert all_seconds <= 20 * 10 + seconds
    inside = Counter()
    for what, name in zip(log[::2], log[1::2], strict=True):
        inside[name] += 1 if what == "+" else -1
        assert not (inside["X"] and inside["c"])


def test_who_waits_hears_that_the_replica_lives():
    """Each second, first that nothing has begun; and then answers as they come, and the last at once."""

    async def test(replica):
        first = asyncio.create_task(replica.answer("t", 3.5, ["x"] * 9))
        await asyncio.sleep(1)
        parts = []
        with replica.admission.block("t", alone=False) as enter:
            rows = [replica.row(seconds) for seconds in (0.9, 2.2, 4.7)]
            began = asyncio.get_running_loop().time()
            async for part in in_parts("r", rows, replica.admission, enter):
                at = asyncio.get_running_loop().time() - began
                parts.append((round(at, 1), part.begun, [number for number, _ in part.outcomes]))
        await first
        return parts

    assert on_a_replica(8, test)[0] == [
        (1.0, False, []),
        (2.0, False, []),
        (2.5, True, []),
        (3.5, True, [0]),
        (4.5, True, []),
        (5.5, True, [1]),
        (6.5, True, []),
        (7.2, True, [2]),
    ]


@pytest.mark.parametrize("failing", [False, True])
def test_no_answer_is_lost_while_a_part_is_handed_over(failing):
    """Serve may take its time for each: rows that end meanwhile come with the next part, also before an error."""

    async def fail(enter):
        async with enter():
            await asyncio.sleep(2.5)
            raise EngineError("it died")

    async def test(replica):
        found = []
        with replica.admission.block("t", alone=False) as enter, suppress(EngineError):
            rows = [replica.row(0.5), replica.row(2), *[fail] * failing]
            async for part in in_parts("r", rows, replica.admission, enter):
                found += [number for number, _ in part.outcomes]
                await asyncio.sleep(3)
        return found

    assert on_a_replica(8, test)[0] == [0, 1]


def test_rows_that_are_given_up_leave_no_trace():
    """Whether they waited, were inside, wanted to be alone, or were let in at that moment."""

    async def test(replica):
        inside = asyncio.create_task(replica.answer("a", 60, ["x"] * 9))
        await asyncio.sleep(1)
        waiting = asyncio.create_task(replica.answer("b", 60, ["y"] * 9))
        alone = asyncio.create_task(replica.answer("b", 60, ["z"], alone=True))
        await asyncio.sleep(1)
        for task in (alone, waiting, inside):
            task.cancel()
        await asyncio.gather(inside, waiting, alone, return_exceptions=True)
        await asyncio.sleep(1)
        assert replica.admission.tasks == []
        assert replica.admission.rows == 0
        await replica.answer("c", 1, ["w"], alone=True)
        await replica.answer("c", 1, ["w"])

    assert on_a_replica(8, test)[1] == 5


def test_an_engine_that_ended_ends_those_who_wait():
    """They were not in it: none of them has begun."""

    async def test(replica):
        inside = asyncio.create_task(replica.answer("a", 60, ["x"] * 9))
        await asyncio.sleep(1)
        parts = []

        async def wait():
            with replica.admission.block("b", alone=False) as enter:
                async for part in in_parts("r", [replica.row(1)], replica.admission, enter):
                    parts.append(part)

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(2)
        replica.admission.end(EngineError("it died"))
        for task in (waiting, inside):
            with pytest.raises(EngineError, match="it died"):
                await task
        ended = asyncio.get_running_loop().time()
        with pytest.raises(EngineError, match="it died"):
            await replica.answer("c", 1)
        # Not at once: it would have the fewest rows of all replicas, and be asked again and again.
        assert asyncio.get_running_loop().time() == ended + GIVE_WAY_S
        return {part.begun for part in parts}

    begun, seconds = on_a_replica(8, test)
    assert begun == {False}
    assert seconds < 5 + GIVE_WAY_S


def test_nobody_waits_for_an_engine_that_does_nothing():
    """Waiting has a bound of its own, and it is a generous one."""

    async def test(replica):
        stuck = asyncio.create_task(replica.answer("a", 10 * WAITING_S, ["x"] * 9))
        await asyncio.sleep(1)
        with pytest.raises(EngineError, match="no row has entered or left the engine"):
            await replica.answer("b", 1)
        stuck.cancel()
        with suppress(asyncio.CancelledError, EngineError):
            await stuck

    assert WAITING_S < on_a_replica(8, test)[1] < WAITING_S + 60


class Memory:
    """An engine with many places, and memory for a few rows; what else it is given waits in it, in order.

    A row gets a token a second while it is worked on.

    Attributes:
        inside: how many rows are in the engine.
    """

    def __init__(self, capacity, fitting):
        self.clock = asyncio.get_running_loop().time
        self.admission = Admission(capacity, self.clock)
        self.stalls = Stalls(self.tokens, self.admission.fit)
        self.memory = asyncio.Semaphore(fitting)
        self.began = {}
        self.names = iter(range(10**6))

    @property
    def inside(self):
        return self.admission.rows

    def tokens(self, names):
        return {name: int(self.clock() - began) for name, began in self.began.items()}

    async def _row(self, seconds, enter):
        name = str(next(self.names))
        async with enter(), self.stalls.bounded(name, None), self.memory:
            self.began[name] = self.clock()
            await asyncio.sleep(seconds)
            del self.began[name]
            return Answer(name, "stop", 1, 1)

    async def answer(self, task, rows, seconds):
        """Answer so many rows of a task, each in as many seconds; return how long that took."""
        began = self.clock()
        with self.admission.block(task, alone=False) as enter:
            parts = in_parts("r", [partial(self._row, seconds)] * rows, self.admission, enter)
            assert sum([len(part.outcomes) async for part in parts]) == rows
        return self.clock() - began


def with_memory(capacity, fitting, test):
    async def run():
        engine = Memory(capacity, fitting)
        try:
            return await test(engine)
        finally:
            engine.stalls._looking.cancel()

    return on_a_clock(run())[0]


def test_rows_for_which_there_is_no_memory_wait_here():
    """Where tasks have equal parts; else a small one would stand behind all that the large one has in the engine."""

    async def test(engine):
        large = asyncio.create_task(engine.answer("large", 200, 60))
        await asyncio.sleep(64 / 4 * 60 + 300)
        inside = engine.inside
        small = await engine.answer("small", 8, 60)
        return inside, small, await large

    inside, small, large = with_memory(64, 4, test)
    # Four that it works on, and eight at hand.
    assert inside <= 4 + 8 + 4
    # With half of the engine, four rounds; and what is at hand before that.
    assert small <= 1.5 * 8 / 2 * 60 + 12 / 4 * 60
    # It has never paused.
    assert large == pytest.approx((200 + 8) / 4 * 60, rel=0.01)


def test_an_engine_that_has_memory_again_is_filled():
    """Within two looks; and at no time it is given fewer rows than it can work on."""

    async def test(engine):
        await engine.answer("long", 100, 60)
        for _ in range(60):
            engine.memory.release()
        short = asyncio.create_task(engine.answer("short", 5_000, 2))
        await asyncio.sleep(2 * LOOK_PERIOD_S)
        inside = engine.inside
        return inside, await short

    inside, short = with_memory(64, 4, test)
    assert inside >= 64
    assert short <= 5_000 / 64 * 2 + 2 * LOOK_PERIOD_S


@pytest.mark.parametrize(("rows", "seconds"), [(5_000, 1), (1_000, 30)])
def test_an_engine_that_has_memory_is_kept_full(rows, seconds):
    """As if nobody looked."""

    async def test(engine):
        return await engine.answer("t", rows, seconds)

    assert with_memory(64, 64, test) <= rows / 64 * seconds + 2 * seconds
