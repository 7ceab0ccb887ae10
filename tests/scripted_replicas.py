"""An engine of several replicas on a clock, without Ray and vLLM; admission, parts, window and recovery are real.

A row is how many seconds it takes; one below zero kills its replica as soon as it is worked on.
"""

import asyncio
from contextlib import aclosing
from functools import partial

from airflow_provider_raylm.cluster.batch.exchange import Answer
from airflow_provider_raylm.cluster.batch.recovery import EngineFailure, Recovery
from airflow_provider_raylm.cluster.batch.window import Window, in_order
from airflow_provider_raylm.cluster.replica.admission import Admission
from airflow_provider_raylm.cluster.replica.serving import in_parts
from tests.clock import on_a_clock

LOOK_PERIOD_S = 10.0
# Of a block's rows, and until a replica that died is back.
WAVE_S = 120.0
RESTART_S = 180.0


class Replica:
    """Works on *capacity* rows at a time; what else it has been given waits in it, as in vLLM.

    Attributes:
        outstanding: rows that it has been given and not answered.
        drained: whether it is to be stopped in good order.
    """

    def __init__(self, name, capacity):
        self.name = name
        self.admission = Admission(capacity, asyncio.get_running_loop().time)
        self.places = asyncio.Semaphore(capacity)
        self.died = asyncio.Event()
        self.drained = False
        self.outstanding = 0

    async def row(self, seconds, enter):
        async with enter(), self.places:
            if seconds < 0:
                self.died.set()
                await asyncio.Event().wait()
            await asyncio.sleep(seconds)
            return Answer(str(seconds), "stop", 1, 1)


class Replicas:
    """An engine.

    Args:
        count: its replicas.
        capacity: rows that each works on at a time.
        restart: seconds until one that died is back.
    """

    def __init__(self, count, capacity, restart):
        self.capacity = capacity
        self.restart = restart
        self.names = iter(range(10**6))
        self.running = []
        self.changed = asyncio.Event()
        self.deaths = 0
        self.tasks = set()
        self.background = set()
        for _ in range(count):
            self.add()

    def close(self):
        for task in self.background:
            task.cancel()

    def later(self, coroutine):
        task = asyncio.create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    def add(self):
        replica = Replica(next(self.names), self.capacity)
        self.running.append(replica)
        self.changed.set()
        self.changed = asyncio.Event()
        self.later(self._replace(replica))

    async def _replace(self, replica):
        await replica.died.wait()
        if replica.drained:
            return
        self.deaths += 1
        self.running.remove(replica)
        await asyncio.sleep(self.restart)
        self.add()

    def remove(self, grace):
        """Take a replica out in good order: it is given nothing more, and is stopped after *grace* seconds."""
        replica = self.running.pop()
        replica.drained = True

        async def stop():
            await asyncio.sleep(grace)
            replica.died.set()

        self.later(stop())

    async def well(self):
        while not self.running:
            await self.changed.wait()

    async def ask(self, task, question, requests, *, alone, near):
        await self.well()
        replica = min(self.running, key=lambda one: one.outstanding)
        replica.outstanding += len(requests)
        died = asyncio.ensure_future(replica.died.wait())
        begun, answered = False, 0
        try:
            with replica.admission.block(task, alone) as enter:
                rows = [partial(replica.row, seconds) for seconds in requests]
                async with aclosing(in_parts(str(replica.name), rows, replica.admission, enter)) as parts:
                    while True:
                        coming = asyncio.ensure_future(anext(parts))
                        await asyncio.wait({coming, died}, return_when=asyncio.FIRST_COMPLETED)
                        if not coming.done():
                            coming.cancel()
                            await asyncio.wait({coming})
                            raise EngineFailure("died", begun and not replica.drained)
                        try:
                            part = coming.result()
                        except StopAsyncIteration:
                            return
                        begun = part.begun
                        answered += len(part.outcomes)
                        replica.outstanding -= len(part.outcomes)
                        yield part.outcomes
        finally:
            died.cancel()
            replica.outstanding -= len(requests) - answered

    async def task(self, name, blocks):
        """Have a task's blocks of rows answered; return the outcomes of each."""
        window = Window(None, max(map(len, blocks)))
        self.tasks.add(name)
        recovery = Recovery(window.metered(partial(self.ask, name)), self.well)

        async def look():
            while True:
                share = len(self.tasks)
                window.fit(self.capacity * len(self.running) / share, len(self.running) / share)
                await window.tell()
                await asyncio.sleep(LOOK_PERIOD_S)

        async def items():
            for block in blocks:
                yield block

        looking = asyncio.create_task(look())
        try:
            return [one async for one in in_order(partial(recovery, "{}"), items(), window, len)]
        finally:
            looking.cancel()
            self.tasks.discard(name)


def on_replicas(test, count=1, capacity=32, restart=RESTART_S):
    """Run a test on an engine; return what it returns, the seconds it took, and the engine."""
    engines = []

    async def run():
        engines.append(Replicas(count, capacity, restart))
        try:
            return await test(engines[0])
        finally:
            engines[0].close()

    result, seconds = on_a_clock(run())
    return result, seconds, engines[0]


def blocks(count, rows=32, seconds=WAVE_S):
    """Return blocks of rows of equal length."""
    return [[seconds] * rows for _ in range(count)]


async def crash(engine, count, waves, number):
    """Have some blocks answered, while a replica dies after so many waves."""
    task = asyncio.create_task(engine.task("t", blocks(count)))
    await asyncio.sleep(waves * WAVE_S)
    engine.running[number].died.set()
    return await task
