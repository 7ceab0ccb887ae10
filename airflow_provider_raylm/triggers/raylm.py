"""The waits without a worker: for a Ray job, and for an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.sdk import TaskInstanceState
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_raylm.errors import RayLMError, to_wire
from airflow_provider_raylm.following import Follower
from airflow_provider_raylm.observability import measure_progress
from airflow_provider_raylm.polling import OUTAGE_LIMIT_S, PENDING_TIMEOUT_S, Refused, Unreachable, Watch
from airflow_provider_raylm.specs import EngineQuery, EngineRef, Progress, build
from airflow_provider_raylm.triggers.connections import Connection, connection

# A trigger that begins later than that after its task was deferred has taken over from another triggerer.
TAKEN_OVER_AFTER_S = 60.0


class _Refusals:
    """Bears a refused token for as long as silence: it has changed, and the connection will.

    What the connection was when the task was deferred says nothing.
    """

    def __init__(self, shared: Connection, log: Any) -> None:
        self._shared = shared
        self._log = log
        self._since: float | None = None

    def over(self) -> None:
        """Take note that the token is accepted."""
        self._since = None

    def bear(self, error: Refused) -> None:
        """Have the connection read again.

        Raises:
            Refused: that has been so for long enough.
        """
        if self._since is None:
            self._since = time.monotonic()
            self._log.warning("%s Reading the connection again for %g s.", error, OUTAGE_LIMIT_S)
        if time.monotonic() - self._since >= OUTAGE_LIMIT_S:
            raise error
        self._shared.renew()


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
        pending_timeout: seconds that the job may wait to start.
    """

    def __init__(
        self,
        raylm_conn_id: str,
        submission_id: str,
        poll_interval: float,
        deadline: float | None,
        deferred_at: float,
        pending_timeout: float = PENDING_TIMEOUT_S,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.raylm_conn_id = raylm_conn_id
        self.submission_id = submission_id
        self.poll_interval = poll_interval
        self.deadline = deadline
        self.deferred_at = deferred_at
        self.pending_timeout = pending_timeout

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments."""
        arguments = (
            *("raylm_conn_id", "submission_id", "poll_interval"),
            *("deadline", "deferred_at", "pending_timeout"),
        )
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in arguments}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look at the job until it has ended, and hand its lines on to the task's log."""
        try:
            async with connection(self.raylm_conn_id) as shared:
                event = {
                    "result": await self._follow(shared),
                    "dashboard_url": (await shared.jobs()).dashboard_url,
                    "submission_id": self.submission_id,
                }
        except RayLMError as error:
            event = {"error": to_wire(error)}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _follow(self, shared: Connection) -> dict[str, Any]:
        said: list[str] = []
        told: list[Progress] = []
        follower = Follower(await shared.jobs(), self.submission_id, said.append, self.poll_interval, told.append)
        seen: dict[str, Any] | Watch = Watch(deadline=self.deadline, pending_timeout=self.pending_timeout)
        if time.time() - self.deferred_at > TAKEN_OVER_AFTER_S:
            try:
                await shared.look(follower.skip)
            except Unreachable as error:
                self.log.warning("%s", error)
        refusals = _Refusals(shared, self.log)
        while isinstance(seen, Watch):
            try:
                follower.jobs = await shared.jobs()
                seen = await shared.look(follower.step, seen)
                refusals.over()
            except Refused as error:
                refusals.bear(error)
            finally:
                # Here and not in the thread, which does not know whose log it is.
                while said:
                    self.log.info("%s", said.pop(0))
                # `dag.test()` runs a trigger without its task.
                if told and getattr(self, "task_instance", None) is not None:
                    measure_progress(self.task_instance, told[-1])
                told.clear()
            if isinstance(seen, Watch):
                await asyncio.sleep(shared.pause(self.poll_interval))
        return seen

    async def on_kill(self) -> None:
        """Stop the job, unless the task is still deferred.

        Airflow calls this when a user has marked or cleared the task, and also in a triggerer that stood still for so
        long that another one has taken its triggers over: the job is the other one's then.
        """
        if await asyncio.to_thread(self._is_deferred):
            self.log.info("the task is still deferred: another triggerer follows Ray job %s", self.submission_id)
            return
        async with connection(self.raylm_conn_id) as shared:
            refusals = _Refusals(shared, self.log)
            while not await self._is_told_to_stop(shared, refusals):
                await asyncio.sleep(shared.pause(self.poll_interval))

    async def _is_told_to_stop(self, shared: Connection, refusals: _Refusals) -> bool:
        said: list[str] = []
        try:
            await shared.stop(self.submission_id, said.append)
        except Refused as error:
            refusals.bear(error)
            return False
        finally:
            for line in said:
                self.log.info("%s", line)
        return True

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
            async with connection(self.raylm_conn_id) as shared:
                event = {"engine": (await self._find(shared)).model_dump(mode="json")}
        except RayLMError as error:
            event = {"error": to_wire(error)}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _find(self, shared: Connection) -> EngineRef:
        query = build(EngineQuery, self.query)
        refusals = _Refusals(shared, self.log)
        while True:
            try:
                jobs = await shared.jobs()
                found = query.latest(await shared.look(jobs.running_engines))
            except Refused as error:
                refusals.bear(error)
            except Unreachable as error:
                self.log.warning("%s", error)
            else:
                refusals.over()
                if found is not None:
                    return found
            await asyncio.sleep(shared.pause(self.poll_interval))
