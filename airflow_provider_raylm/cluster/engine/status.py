"""What tasks ask about their engine: whether it is there, what is the matter, and what became of a call to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from airflow_provider_raylm.cluster.engine import applications
from airflow_provider_raylm.errors import EngineError, EngineGone, RayLMError
from airflow_provider_raylm.specs import EngineRef

# Begins what Ray Data adds to the text of whatever its stages raise: how to have it retry.
_RAY_DATAS_ADVICE = "\nFailed to apply UDF transform"

ABOUT_TIMEOUT_S = 60.0

Say = Callable[[str], None]


def require_running(application: str) -> None:
    """Return when the engine can take work.

    Raises:
        EngineGone: it is gone or not healthy; the text says which task to clear.
    """
    status = applications.status_of(application)
    if status is None:
        raise EngineGone(gone(application))
    if status.status != ApplicationStatus.RUNNING:
        raise EngineGone(
            f"The engine {application} is {status.status.value}: {applications.engine_message(status)} Clear the "
            "deploy task together with this one to start it anew."
        )


def wait_until_running(ref: EngineRef, timeout: float, say: Say) -> None:
    """Return when the engine can take work; one that is coming back is waited for.

    Raises:
        EngineError: it is gone, another one, or not running after *timeout* seconds; the text says which task to clear.
    """
    require_there(ref)
    application = ref.application
    end = time.monotonic() + timeout
    said = False
    while is_coming_back(application) and time.monotonic() < end:
        if not said:
            what = trouble(application)
            say(f"the engine is not well: {what}; waiting for it at most {timeout:g} s (engine_timeout)")
        said = True
        time.sleep(applications.POLL_PERIOD_S)
    require_running(application)


def is_coming_back(application: str) -> bool:
    """Return whether it may be able to take work soon."""
    status = applications.status_of(application)
    return status is not None and status.status in (ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY)


def require_there(ref: EngineRef) -> None:
    """Return when the engine is there, well or not.

    Raises:
        EngineError: it is gone, or going, or replaced: the answers of two models do not belong into one output.
    """
    status = applications.status_of(ref.application)
    if status is None or status.status == ApplicationStatus.DELETING:
        raise EngineGone(gone(ref.application))
    holder = applications.fingerprint_of(status)
    if holder not in (None, ref.fingerprint):
        raise EngineError(
            f"{ref.application} is another engine by now (fingerprint {holder}, this task's {ref.fingerprint}): it was "
            "replaced. Clear this task, to use the new one."
        )


def vector_size(ref: EngineRef) -> int:
    """Return how many numbers an embedding of a running engine has."""
    about = serve.get_deployment_handle(ref.deployment, ref.application).about.remote()
    return int(about.result(timeout_s=ABOUT_TIMEOUT_S)["vector_size"])


def trouble(application: str) -> str | None:
    """Return what is the matter with an engine that is there, or None when all is well."""
    status = applications.status_of(application)
    if status is None or status.status == ApplicationStatus.RUNNING:
        return None
    return f"{status.status.value}, {applications.show_states(status)}"


@contextmanager
def explained(application: str) -> Iterator[None]:
    """Raise, out of the layers that Ray wraps around a failure, the error that a reader can act on.

    Raises:
        RayLMError: the one that was raised on the cluster; or an EngineError with the engine's state when a call to it
            failed. Anything else is raised as it is.
    """
    try:
        yield
    except Exception as error:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, RayLMError):
                raise type(cause)(str(cause).partition(_RAY_DATAS_ADVICE)[0]) from None
        lost = [cause for cause in causes if isinstance(cause, RayActorError | RayServeException)]
        if not lost:
            raise
        if is_coming_back(application):
            state = "The engine is not well, and may come back. Retry the task: it waits for the engine and"
        else:
            require_running(application)
            state = "The engine is running. Retry the task: it"
        raise EngineError(
            f"A call to the engine {application} failed, or the process that makes them died: "
            f"{last_line(str(lost[-1]))} {state} continues with the missing rows."
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield *error* and what it was raised from, outermost first, without Ray's wrapping of remote errors."""
    while error is not None:
        if isinstance(error, RayTaskError):
            error = error.cause
            continue
        yield error
        error = error.__cause__


def last_line(text: str) -> str:
    """Return the last line of a message or a traceback."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def gone(application: str) -> str:
    """Return what to do when it is gone."""
    return (
        f"The engine {application} is gone: torn down, its lease ran out, or Ray was restarted. Clear the deploy "
        "task together with this one (Airflow clears this task and the teardown with it), or let inference tasks "
        "deploy it again (redeploy)."
    )
