"""The way to the engine: blocks of requests through its deployment handle, equal ones once, and what an error means."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster import engine
from airflow_provider_raylm.cluster.batch.recovery import AskEngine, EngineFailure
from airflow_provider_raylm.cluster.batch.rows import Answer, Content, Refusal
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import EngineRef

Ask = Callable[[str, Sequence[Content]], list[Answer | Refusal]]

# How much longer than its rows' time a call may take before the replica counts as hung.
HUNG_AFTER_S = 60.0
PING_TIMEOUT_S = 40.0
PING_PERIOD_S = 2.0
ABOUT_TIMEOUT_S = 60.0
LOOK_PERIOD_S = 10.0
# What a call through the handle raises when the engine or its replica is at fault.
ENGINE_FAILURES = (EngineError, RayError, RayServeException)


class Calls:
    """Calls on their way. They are cancelled when the engine is gone: Serve keeps one that no replica has for ever.

    Args:
        require_there: raises EngineError when the engine is gone.
    """

    def __init__(self, require_there: Callable[[], None]) -> None:
        self._require_there = require_there
        self._open: set[Any] = set()
        threading.Thread(target=self._look, name="raylm-calls", daemon=True).start()

    @contextmanager
    def open(self, response: Any) -> Iterator[Any]:
        """Yield the response of a call that is on its way while the body runs."""
        self._open.add(response)
        try:
            yield response
        finally:
            self._open.discard(response)

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_PERIOD_S)
            try:
                self._require_there()
            except EngineError:
                for response in tuple(self._open):
                    response.cancel()
            except (RayError, RayServeException):
                # Serve's controller is being restarted.
                continue


def through_handle(handle: Any, timeout: float, calls: Calls, caller: Any = None) -> AskEngine:
    """Return a function that asks a block of requests through a deployment handle.

    Args:
        handle: handle of a ``BlockLLMServer`` deployment.
        timeout: seconds per row in the engine.
        calls: holds those that are on their way.
        caller: handle of the actor that asks; the engine gives up what it asked when it has died.

    Raises (the returned function):
        EngineFailure: the engine failed, its replica is gone, or it does not answer at all.
        EngineError: it does not know the call: another version of this package deployed it.
        BatchError: it refuses what all rows share.
    """

    def ask(fields: str, contents: Sequence[Content], *, alone: bool) -> list[Answer | Refusal]:
        begun = not alone
        try:
            if alone:
                stream = handle.options(stream=True).run_block_alone.remote(fields, list(contents), timeout, caller)
                with calls.open(stream):
                    next(stream)
                    begun = True
                    answers: list[Answer | Refusal] = next(stream)
            else:
                with calls.open(handle.run_block.remote(fields, list(contents), timeout, caller)) as response:
                    answers = _bounded(response, timeout + HUNG_AFTER_S)
        except ENGINE_FAILURES as error:
            _raise_others(error)
            raise EngineFailure(_last_line(error), begun) from None
        if len(answers) != len(contents):
            raise EngineError(f"the engine answered {len(answers)} of {len(contents)} rows of a block")
        return answers

    return ask


def until_well(handle: Any, ref: EngineRef, timeout: float) -> Callable[[], None]:
    """Return a function that waits until the engine answers.

    Args:
        handle: handle of a ``BlockLLMServer`` deployment.
        ref: the engine.
        timeout: seconds to wait at most.

    Raises (the returned function):
        EngineError: the engine is gone, another one, or not back in time.
    """

    def wait() -> None:
        end = time.monotonic() + timeout
        while True:
            engine.require_there(ref)
            try:
                _bounded(handle.ping.remote(), PING_TIMEOUT_S)
                return
            except ENGINE_FAILURES as error:
                _raise_others(error)
                if time.monotonic() >= end:
                    raise EngineError(
                        f"The engine {ref.application} failed and is not back after engine_timeout ({timeout:g} s): "
                        f"{_last_line(error)}. Retry the task when it is well: it goes on with the rows that are "
                        "missing. Or clear the deploy task together with this one."
                    ) from None
            time.sleep(PING_PERIOD_S)

    return wait


def meet(handle: Any, wait: Callable[[], None]) -> int:
    """Return how many requests a replica works on at a time, once the engine is well and of this version.

    Args:
        handle: handle of a ``BlockLLMServer`` deployment.
        wait: returns when the engine answers.

    Raises:
        EngineError: another version of this package deployed it.
    """
    wait()
    try:
        about = _bounded(handle.about.remote(), ABOUT_TIMEOUT_S)
    except ENGINE_FAILURES as error:
        _raise_others(error)
        raise EngineError(f"The engine answers, but does not say what it is: {_last_line(error)}") from None
    if about["version"] != __version__:
        raise EngineError(_other_version(about["version"]))
    return int(about["capacity"])


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


def _bounded(response: Any, timeout: float) -> Any:
    try:
        return response.result(timeout_s=timeout)
    except TimeoutError:
        response.cancel()
        raise EngineError(f"the engine did not answer within {timeout:g} s") from None


def _last_line(error: Exception) -> str:
    # The cause of what Ray wraps; of a traceback in a message, the line that says what was raised.
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]


# Answers that are kept for rows to come; one takes about a kilobyte.
ANSWERS_KEPT = 100_000


def once(ask: Ask, keep: int = ANSWERS_KEPT) -> Ask:
    """Return a function that asks equal requests once and gives all of them the one answer.

    A request that is on its way in another thread is waited for. Of answered requests the last *keep* are remembered.
    """
    known: OrderedDict[bytes, Future[Answer | Refusal]] = OrderedDict()
    lock = threading.Lock()

    def ask_new(fields: str, contents: Sequence[Content]) -> list[Answer | Refusal]:
        answers: list[Future[Answer | Refusal]] = []
        new: list[tuple[bytes, Future[Answer | Refusal], Content]] = []
        with lock:
            for content in contents:
                key = hashlib.blake2b(json.dumps([fields, content]).encode(), digest_size=16).digest()
                answer = known.get(key)
                if answer is None:
                    answer = known[key] = Future()
                    new.append((key, answer, content))
                answers.append(answer)
            while len(known) > keep:
                known.popitem(last=False)
        # Own requests first: whoever waits for another thread has none of its own left to ask.
        try:
            got = ask(fields, [content for *_, content in new]) if new else []
        except BaseException as error:
            for _, answer, _ in new:
                answer.set_exception(error)
            raise
        for (key, answer, _), outcome in zip(new, got, strict=True):
            if isinstance(outcome, Refusal) and outcome.reason == "timeout":
                # The engine's haste or rest is not the question's: the next equal row is asked again.
                with lock:
                    known.pop(key, None)
            answer.set_result(outcome)
        return [answer.result() for answer in answers]

    return ask_new
