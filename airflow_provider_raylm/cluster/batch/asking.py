"""The way to the engine: blocks of requests through its deployment handle, and what an error means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch.exchange import Part, Request, packed
from airflow_provider_raylm.cluster.batch.recovery import Answered, EngineFailure
from airflow_provider_raylm.cluster.engine import status
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import EngineRef

# A replica says a part of each block about once a second. One that is silent for so long is not waited for; nor is a
# call that Serve has no replica for.
SILENT_S = 300.0
PING_TIMEOUT_S = 40.0
PING_PERIOD_S = 2.0
# What a call through the handle raises when the engine or its replica is at fault.
ENGINE_FAILURES = (EngineError, RayError, RayServeException)


class Silent(EngineError):
    """The engine is there, and does not say what it is; it may do so later."""


@dataclass(frozen=True)
class Engine:
    """What an engine has at the moment.

    Attributes:
        replicas: ids of those that take work.
        capacity: rows that they work on at a time, together.
        cache_tokens: tokens that one of them keeps.
        tasks: outputs of the tasks that have rows there.
    """

    replicas: frozenset[str]
    capacity: int
    cache_tokens: int
    tasks: frozenset[str]


class Handle:
    """A deployment handle of a ``BlockLLMServer``, as a task uses it.

    Args:
        handle: Serve's.
        ref: the engine.
        task: the output of the task, by which the engine knows it.
        timeout: seconds that a row may be in the engine; None for as long as it gets tokens.
        caller: handle of the actor that asks; the engine gives up what it asked when it has died.
    """

    def __init__(self, handle: Any, ref: EngineRef, task: str, timeout: float | None, caller: Any = None) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._ref = ref
        self._shared = {"task": task, "timeout": timeout, "caller": caller}
        self._gone = asyncio.Event()
        self._known: set[str] = set()
        self._listed: frozenset[str] = frozenset()
        self._listed_at = 0.0

    async def ask(
        self, question: str, requests: Sequence[Request], *, alone: bool, near: str | None
    ) -> AsyncGenerator[Answered]:
        """Answer a block, in parts; see ``AskEngine``.

        Raises:
            EngineFailure: the engine failed, its replica is gone, or it is silent.
            EngineError: it does not know the call: another version of this package deployed it.
            BatchError: it refuses what all rows share.
        """
        last: Part | None = None
        heard_at = 0.0
        ended = False
        response = self._stream.run_block.remote(
            *packed(requests), question=question, rows=len(requests), alone=alone, near=near, **self._shared
        )
        try:
            while True:
                last = await self._next(response)
                heard_at = time.monotonic()
                yield last.outcomes
        except StopAsyncIteration:
            ended = True
        except ENGINE_FAILURES as error:
            _raise_others(error)
            drained = last is not None and self._was_draining(last.replica, heard_at)
            raise EngineFailure(_last_line(error), last is not None and last.begun and not drained) from None
        finally:
            if not ended:
                response.cancel()

    async def _next(self, response: Any) -> Part:
        """Return the next part of an answer.

        Serve keeps a call that no replica takes for ever, also when the engine is gone.

        Raises:
            EngineError: the engine is gone, or silent.
        """
        part = asyncio.ensure_future(anext(response))
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            done, _ = await asyncio.wait({part, gone}, timeout=SILENT_S, return_when=asyncio.FIRST_COMPLETED)
            if part.cancelled():
                # Not by this side. Raised as it is, it would look as if this task were to end.
                raise EngineError("the replica has cancelled the call")
            if part in done:
                said: Part = part.result()
                return said
            raise EngineError("the engine is gone" if gone in done else f"the engine is silent for {SILENT_S:g} s")
        finally:
            part.cancel()
            gone.cancel()

    def _was_draining(self, replica: str, heard_at: float) -> bool:
        """Return whether a replica answered when it was not listed any more: Serve was about to stop it, in good order.

        One that dies is listed until it does; one that has come since the last look has not been listed yet.
        """
        return replica in self._known - self._listed and heard_at > self._listed_at

    async def look(self) -> Engine:
        """Return what the engine has; one that is gone ends all calls.

        Raises:
            EngineError: it is gone, or does not say (Silent).
        """
        try:
            await asyncio.to_thread(status.require_there, self._ref)
        except EngineError:
            self._gone.set()
            raise
        began = time.monotonic()
        try:
            abouts = await asyncio.to_thread(self._abouts)
        except (TimeoutError, *ENGINE_FAILURES) as error:
            _raise_others(error)
            raise Silent(f"The engine does not say what it is: {_last_line(error)}") from None
        found = _engine_of(abouts)
        self._known |= found.replicas
        self._listed, self._listed_at = found.replicas, began
        return found

    def _abouts(self) -> list[dict[str, Any]]:
        answers = self._handle.broadcast("about").results(timeout_s=status.ABOUT_TIMEOUT_S, return_exceptions=True)
        abouts = [answer for answer in answers if isinstance(answer, dict)]
        if not abouts:
            raise next((one for one in answers if isinstance(one, Exception)), EngineError("it has no replica"))
        return abouts

    async def arrive(self, timeout: float) -> Engine:
        """Return what the engine has when it answers, as ``until_well``; a replica may just be dying, or hang."""
        end = time.monotonic() + timeout
        while True:
            await self.until_well(timeout)
            try:
                return await self.look()
            except Silent:
                if time.monotonic() >= end:
                    raise
            await asyncio.sleep(PING_PERIOD_S)

    async def until_well(self, timeout: float) -> None:
        """Return when the engine answers.

        Args:
            timeout: seconds to wait at most.

        Raises:
            EngineError: the engine is gone, another one, or not back in time.
        """
        end = time.monotonic() + timeout
        while True:
            await asyncio.to_thread(status.require_there, self._ref)
            try:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await self._handle.ping.remote()
                return
            except (TimeoutError, *ENGINE_FAILURES) as error:
                _raise_others(error)
                if time.monotonic() >= end:
                    raise EngineError(
                        f"The engine {self._ref.application} failed and is not back after engine_timeout "
                        f"({timeout:g} s): {_last_line(error)}. Retry the task when it is well: it continues with the "
                        "rows that are missing. Or clear the deploy task together with this one."
                    ) from None
            await asyncio.sleep(PING_PERIOD_S)


def _engine_of(abouts: list[dict[str, Any]]) -> Engine:
    """Return what replicas have together, by what each says.

    Raises:
        EngineError: another version of this package deployed it.
    """
    for about in abouts:
        if about["version"] != __version__:
            raise EngineError(_other_version(about["version"]))
    return Engine(
        replicas=frozenset(about["replica"] for about in abouts),
        capacity=sum(about["capacity"] for about in abouts),
        cache_tokens=min(about["cache_tokens"] for about in abouts),
        tasks=frozenset(task for about in abouts for task in about["tasks"]),
    )


def _raise_others(error: Exception) -> None:
    """Raise what is no failure of an engine, which waiting for it would not mend.

    Raises:
        BatchError: it refuses what all rows of a block share.
        EngineError: its code does not know what it was called with.
    """
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, BatchError):
        raise BatchError(str(cause)) from None
    # Serve has no class of its own for a method that is not there.
    unknown = isinstance(cause, RayServeException) and "does not exist" in str(cause)
    if unknown or isinstance(cause, TypeError | AttributeError | ImportError):
        raise EngineError(f"{_other_version('another version')} Its own words: {_last_line(error)}") from None


def _other_version(version: str) -> str:
    return (
        f"The engine was deployed by {version} of airflow-provider-raylm, this task runs {__version__}. One version "
        "has to do both: clear the deploy task together with this one, or upgrade the DAG that lends the engine."
    )


def _last_line(error: Exception) -> str:
    # The cause of what Ray wraps; of a traceback in a message, the line that says what was raised.
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
