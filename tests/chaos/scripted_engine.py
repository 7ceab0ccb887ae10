"""What runs a cluster's jobs instead of Python, so that the engines they deploy are scripted: nothing else differs.

``python -m tests.chaos.scripted_engine -m airflow_provider_raylm.cluster deploy`` is the package's own job, with the
lease, the labels and the bundles of any engine. In the replica, where vLLM would be, every row takes a while that grows
with its ``max_tokens``. As with vLLM there is a process below the replica that the rows go through: it writes down what
it is asked, dies and hangs of marked rows, and can be killed and stopped.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from airflow_provider_raylm.cluster.batch.exchange import Answer, Content, Outcome, Refusal
from airflow_provider_raylm.cluster.replica.admission import Enter
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.specs import EngineSpec
from tests.chaos.marks import DEADLY, HELD, HOLD, STOPPING, WITNESS
from tests.light_engine import LightEngine

CAPACITY = 128
SECONDS_PER_TOKEN = 1 / 80
# Characters beside which no answer fits, as for the tiny model.
TOO_LONG = 5_000
# A variable of the engine's environment: seconds that a start takes longer.
LOADS_FOR = "RAYLM_LOADS_FOR"

# The process below the replica: it repeats each line when it has done what the line says. Stopped, it would not notice
# that the replica has died: the kernel kills it then.
_CORE = """
import ctypes, os, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
witness = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
for line in sys.stdin:
    what = line.split()[1]
    if what != "ping" and what != "end":
        os.write(witness, b".")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(1e6)
    sys.stdout.write(line)
    sys.stdout.flush()
"""
# As vLLM calls its own, by which whoever looks for either finds it.
_CORE_NAME = "VLLM::EngineCore"


def scripted(cluster: Any) -> Any:
    """Return the cluster as one whose jobs deploy scripted engines."""
    return replace(cluster, python=f"python -m {__spec__.name}")


class Core:
    """The process that the rows go through."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = count()
        self._open: dict[int, asyncio.Future[None]] = {}
        self._is_dead = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, witness: str) -> Core:
        command = [sys.executable, "-I", "-S", "-c", _CORE, _CORE_NAME, witness]
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

    async def does(self, what: str) -> None:
        """Return when the process has done *what*.

        Raises:
            EngineError: it is dead.
        """
        if self._is_dead:
            raise EngineError("the engine's process is dead")
        number = next(self._numbers)
        done = self._open[number] = asyncio.get_running_loop().create_future()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{number} {what}\n".encode())
            await done
        finally:
            del self._open[number]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            done = self._open.get(int(line.split()[0]))
            if done is not None and not done.done():
                done.set_result(None)
        self._is_dead = True
        for done in self._open.values():
            if not done.done():
                done.set_exception(EngineError("the engine's process has died"))


class ScriptedEngine(LightEngine):
    """Has the methods of the package's own deployment."""

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__(CAPACITY)
        engine = EngineSpec.model_validate(spec)
        if not Path(engine.model).exists():
            raise EngineError(f"{engine.model} is not there")
        await asyncio.sleep(float(os.environ.get(LOADS_FOR, 0)))
        self._core = await Core.start(os.environ.get(WITNESS, os.devnull))

    async def ping(self) -> None:
        await self._core.does("ping")

    async def check_health(self) -> None:
        self.admission.require_open()
        try:
            await self.ping()
        except EngineError as error:
            # As the package's own: rows that still wait have no engine to wait for.
            self.admission.end(error)
            raise

    async def row(self, fields: dict[str, Any], content: Content, enter: Enter) -> Outcome:
        """Answer one row when it has had its place for so long.

        Raises:
            EngineError: the process has died.
        """
        if len(content) >= TOO_LONG:
            return Refusal("prompt_too_long", "too long")
        async with enter():
            try:
                await self._core.does("die" if DEADLY in content else "hang" if STOPPING in content else "row")
                await asyncio.sleep(fields["max_tokens"] * SECONDS_PER_TOKEN)
                while HELD in content and Path(os.environ[HOLD]).exists():
                    await asyncio.sleep(0.1)
                await self._core.does("end")
            except EngineError as error:
                # As the package's own: rows that still wait have had no part in its death.
                self.admission.end(error)
                raise
        return Answer("so", "stop", 1, 1)


if __name__ == "__main__":
    from airflow_provider_raylm.cluster.__main__ import main
    from airflow_provider_raylm.cluster.engine import llm

    # A look at an engine without vLLM costs little, and tests wait for it.
    llm.HEALTH_CHECK_PERIOD_S = 0.5
    llm._SERVER = f"{__spec__.name}.{ScriptedEngine.__name__}"
    # Behind "-m airflow_provider_raylm.cluster".
    sys.exit(main(sys.argv[3:]))
