"""What the triggers of a process share for each connection: threads, a client that is up to date, and one voice.

A cluster that is silent delays nobody who waits for another; and however many wait for it, few ask it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from airflow_provider_raylm.following import Say, patiently
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.polling import JobInfo, Unreachable
from airflow_provider_raylm.ray_jobs import RayJobs
from airflow_provider_raylm.specs import EngineRef

# For each connection, to look, and to stop jobs, which no look delays.
THREADS = 4
# All triggers of a connection look so often together at most, however many they are: the load on the triggerer and the
# dashboard does not grow with the tasks that wait.
LOOKS_PER_S = 10.0
# Then the connection is read again: it may have been edited, or its token have changed.
CLIENT_KEPT_S = 300.0
# Longer than a request may take that has begun with it.
CLOSED_AFTER_S = 120.0
# Between two requests to a silent cluster: twice as long each time.
SILENT_FOR_S = (1.0, 30.0)

Result = TypeVar("Result")


class OneVoice:
    """A client that does not ask again for a while what was not answered: the answer is the same for all who wait."""

    def __init__(self, jobs: RayJobs) -> None:
        self._jobs = jobs
        self._silence: Unreachable | None = None
        self._again_at = 0.0
        self._pause = SILENT_FOR_S[0]

    @property
    def dashboard_url(self) -> str:
        """Address of the dashboard."""
        return self._jobs.dashboard_url

    def get(self, submission_id: str) -> JobInfo | None:
        """Return the job, or None."""
        return self._ask(partial(self._jobs.get, submission_id))

    def logs(self, submission_id: str, lines: int | None = None) -> str:
        """Return the last *lines* of the job's output, or all."""
        return self._ask(partial(self._jobs.logs, submission_id, lines))

    def running_engines(self) -> tuple[EngineRef, ...]:
        """Return the engines that can take work."""
        return self._ask(self._jobs.running_engines)

    def stop(self, submission_id: str) -> None:
        """Ask the job to stop, in any case."""
        self._jobs.stop(submission_id)

    def close(self) -> None:
        """Give back what the client holds."""
        self._jobs.close()

    def _ask(self, call: Callable[[], Result]) -> Result:
        now = time.monotonic()
        if self._silence is not None and now < self._again_at:
            raise Unreachable(str(self._silence))
        # Until this one has its answer, nobody else asks.
        self._again_at = now + self._pause
        try:
            result = call()
        except Unreachable as error:
            self._silence = error
            self._again_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, SILENT_FOR_S[1])
            raise
        self._silence, self._pause = None, SILENT_FOR_S[0]
        return result


class Connection:
    """One connection, open while there is a trigger that uses it.

    Attributes:
        users: how many do.
    """

    def __init__(self, raylm_conn_id: str) -> None:
        self.users = 0
        self._hook = RayLMHook(raylm_conn_id)
        self._looks = ThreadPoolExecutor(THREADS, thread_name_prefix="raylm-look")
        self._stops = ThreadPoolExecutor(THREADS, thread_name_prefix="raylm-stop")
        self._opening = asyncio.Lock()
        self._jobs: OneVoice | None = None
        self._is_old_at = 0.0

    async def jobs(self) -> OneVoice:
        """Return the client, opened anew now and then; the old one while that fails.

        Raises:
            Exception: the connection cannot be read, or cannot work, and there is no client yet.
        """
        async with self._opening:
            if self._jobs is None or time.monotonic() >= self._is_old_at:
                self._is_old_at = time.monotonic() + CLIENT_KEPT_S
                try:
                    opened = OneVoice(await self._hook.aget_conn())
                except Exception:
                    # Airflow does not tell it for now, or it is being edited: no reason to fail all that wait.
                    if self._jobs is None:
                        raise
                else:
                    if self._jobs is not None:
                        asyncio.get_running_loop().call_later(CLOSED_AFTER_S, self._jobs.close)
                    self._jobs = opened
            return self._jobs

    def renew(self) -> None:
        """Read the connection again when somebody asks for the client."""
        self._is_old_at = 0.0

    async def look(self, call: Callable[..., Result], *arguments: object) -> Result:
        """Return what a call returns that asks the cluster, made in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._looks, call, *arguments)

    async def stop(self, submission_id: str, say: Say) -> None:
        """Tell a job to stop; a silent cluster is borne.

        Raises:
            Unreachable: it stays silent.
        """
        jobs = await self.jobs()
        call = partial(patiently, partial(jobs.stop, submission_id), say)
        await asyncio.get_running_loop().run_in_executor(self._stops, call)

    def pause(self, poll_interval: float) -> float:
        """Return the seconds until a trigger may look again."""
        return max(poll_interval, self.users / LOOKS_PER_S)

    def close(self) -> None:
        """Give all back; a call that is in flight ends by itself."""
        if self._jobs is not None:
            self._jobs.close()
        self._looks.shutdown(wait=False)
        self._stops.shutdown(wait=False)


_connections: dict[str, Connection] = {}


@asynccontextmanager
async def connection(raylm_conn_id: str) -> AsyncIterator[Connection]:
    """Yield what all triggers of the connection share."""
    shared = _connections.get(raylm_conn_id)
    if shared is None:
        shared = _connections[raylm_conn_id] = Connection(raylm_conn_id)
    shared.users += 1
    try:
        yield shared
    finally:
        shared.users -= 1
        if not shared.users:
            del _connections[raylm_conn_id]
            shared.close()
