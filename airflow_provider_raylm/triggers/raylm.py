"""The waits without a worker: for a Ray job, and for an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from airflow.sdk import TaskInstanceState
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_raylm.errors import RayLMError, to_wire
from airflow_provider_raylm.following import Follower
from airflow_provider_raylm.hooks.raylm import RayLMHook
from airflow_provider_raylm.polling import Unreachable, Watch
from airflow_provider_raylm.ray_jobs import RayJobs
from airflow_provider_raylm.specs import EngineQuery, EngineRef, build

# All triggers of a process share these threads, and look so often together at most, however many they are: the load on
# the triggerer and the dashboard does not grow with the tasks that wait.
THREADS = 4
LOOKS_PER_S = 10.0
# A trigger that begins later than that after its task was deferred has taken over from another triggerer.
TAKEN_OVER_AFTER_S = 60.0

_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="raylm-trigger")
Result = TypeVar("Result")


@dataclass
class _Shared:
    """A client that all triggers of one connection use, open while there is one."""

    client: asyncio.Task[RayJobs]
    users: int = 0


_clients: dict[str, _Shared] = {}


@asynccontextmanager
async def _client(raylm_conn_id: str) -> AsyncIterator[RayJobs]:
    shared = _clients.get(raylm_conn_id)
    if shared is None:
        opening = asyncio.create_task(RayLMHook(raylm_conn_id).aget_conn())
        shared = _clients[raylm_conn_id] = _Shared(opening)
    shared.users += 1
    try:
        yield await asyncio.shield(shared.client)
    finally:
        shared.users -= 1
        if not shared.users:
            del _clients[raylm_conn_id]
            if not shared.client.cancel() and not shared.client.cancelled() and not shared.client.exception():
                shared.client.result().close()


def _pause(poll_interval: float) -> float:
    return max(poll_interval, sum(shared.users for shared in _clients.values()) / LOOKS_PER_S)


async def _in_thread(call: Callable[..., Result], *arguments: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_threads, call, *arguments)


class RayJobTrigger(BaseTrigger):
    """Follows a Ray job and fires once, with all that the resumed task needs.

    The event is ``{"result", "dashboard_url", "submission_id"}``, or ``{"error"}`` as the job reported it. A user who
    marks or clears the task stops the job; a triggerer that restarts, or stands still, does not.

    Args:
        raylm_conn_id: connection to the Ray cluster.
        submission_id: the job.
        poll_interval: seconds between two looks, at least.
        deadline: Unix seconds at which the job is stopped; None for no bound.
        deferred_at: Unix seconds.
    """

    def __init__(
        self,
        raylm_conn_id: str,
        submission_id: str,
        poll_interval: float,
        deadline: float | None,
        deferred_at: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.raylm_conn_id = raylm_conn_id
        self.submission_id = submission_id
        self.poll_interval = poll_interval
        self.deadline = deadline
        self.deferred_at = deferred_at

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments."""
        arguments = ("raylm_conn_id", "submission_id", "poll_interval", "deadline", "deferred_at")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in arguments}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look at the job until it has ended, and hand its lines on to the task's log."""
        try:
            async with _client(self.raylm_conn_id) as jobs:
                event = {
                    "result": await self._follow(jobs),
                    "dashboard_url": jobs.dashboard_url,
                    "submission_id": self.submission_id,
                }
        except RayLMError as error:
            event = {"error": to_wire(error)}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _follow(self, jobs: RayJobs) -> dict[str, Any]:
        said: list[str] = []
        follower = Follower(jobs, self.submission_id, said.append, self.poll_interval)
        seen: dict[str, Any] | Watch = Watch(deadline=self.deadline)
        if time.time() - self.deferred_at > TAKEN_OVER_AFTER_S:
            try:
                await _in_thread(follower.skip)
            except Unreachable as error:
                self.log.warning("%s", error)
        while isinstance(seen, Watch):
            try:
                seen = await _in_thread(follower.step, seen)
            finally:
                # Here and not in the thread, which does not know whose log it is.
                while said:
                    self.log.info("%s", said.pop(0))
            if isinstance(seen, Watch):
                await asyncio.sleep(_pause(self.poll_interval))
        return seen

    async def on_kill(self) -> None:
        """Stop the job, unless the task is still deferred.

        Airflow calls this when a user has marked or cleared the task, and also in a triggerer that stood still for so
        long that another one has taken its triggers over: the job is the other one's then.
        """
        if await _in_thread(self._is_deferred):
            self.log.info("the task is still deferred: another triggerer follows Ray job %s", self.submission_id)
            return
        async with _client(self.raylm_conn_id) as jobs:
            await _in_thread(jobs.stop, self.submission_id)

    def _is_deferred(self) -> bool:
        # A triggerer has this module already; whoever parses DAGs need not.
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        ti: Any = self.task_instance
        states = RuntimeTaskInstance.get_task_states(ti.dag_id, ti.map_index, [ti.task_id], run_ids=[ti.run_id])
        return TaskInstanceState.DEFERRED in states.get(ti.run_id, {}).values()


class EngineTrigger(BaseTrigger):
    """Fires with ``{"engine"}``, an EngineRef, as soon as an engine that fits can take work; or with ``{"error"}``.

    A dashboard that does not answer may answer the next time: the sensor's timeout bounds the wait.

    Args:
        raylm_conn_id: connection to the Ray cluster.
        query: which engine: an EngineQuery's fields.
        poll_interval: seconds between two looks, at least.
    """

    def __init__(self, raylm_conn_id: str, query: dict[str, Any], poll_interval: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.raylm_conn_id = raylm_conn_id
        self.query = query
        self.poll_interval = poll_interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments."""
        arguments = ("raylm_conn_id", "query", "poll_interval")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in arguments}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until an engine is found."""
        try:
            async with _client(self.raylm_conn_id) as jobs:
                event = {"engine": (await self._find(jobs)).model_dump(mode="json")}
        except RayLMError as error:
            event = {"error": to_wire(error)}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _find(self, jobs: RayJobs) -> EngineRef:
        query = build(EngineQuery, self.query)
        while True:
            try:
                found = query.latest(await _in_thread(jobs.running_engines))
            except Unreachable as error:
                self.log.warning("%s", error)
            else:
                if found is not None:
                    return found
            await asyncio.sleep(_pause(self.poll_interval))
