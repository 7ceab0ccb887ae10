"""A Ray job: an application under a lease knows who works, lives while it is renewed, and is gone soon after."""

import threading
import time

import ray
from ray import serve

from airflow_provider_raylm.cluster.engine import leases, retire
from airflow_provider_raylm.cluster.engine.lease import CHECK_PERIOD_S, LeaseKeeper
from airflow_provider_raylm.errors import EngineError

NAME = "raylm-lease-test"
LABELS = {"installation": "lease", "dag_id": "d", "run_id": "r", "engine": "e"}


@serve.deployment(name="engine", ray_actor_options={"num_cpus": 0})
class Nothing:
    """Stands where the engine would."""


def run():
    """Run the application and return its lease's handle."""
    now = time.time()
    keeper = serve.deployment(LeaseKeeper, name="lease-test").options(ray_actor_options={"num_cpus": 0})
    bounds = {"idle_timeout": 4.0, "max_lifetime": 600.0}
    return serve.run(keeper.bind(NAME, LABELS, bounds, now, now + 600, Nothing.bind()), name=NAME, route_prefix=None)


def drain() -> None:
    """Two tasks work; a teardown refuses, another waits for the longer one."""
    leases.renew(NAME, "out1")
    leases.renew(NAME, "out2")
    leases.release(NAME, "out1")
    try:
        retire.teardown(NAME, print, on_busy="fail")
    except EngineError as error:
        print(f"refused: {error}")
    threading.Timer(2, leases.release, (NAME, "out2")).start()
    started = time.monotonic()
    retire.teardown(NAME, print, on_busy="wait", drain_timeout=60)
    print(f"waited: {2 <= time.monotonic() - started < 60}")


def main() -> None:
    ray.init()
    serve.start(proxy_location="Disabled")
    run()
    drain()
    handle = run()
    handle.renew.remote().result()
    end = time.monotonic() + 2 * CHECK_PERIOD_S
    while time.monotonic() < end:
        handle.renew.remote().result()
        time.sleep(1)
    renewed = "there" if NAME in serve.status().applications else "gone"
    end = time.monotonic() + 60
    while NAME in serve.status().applications and time.monotonic() < end:
        time.sleep(1)
    left = "there" if NAME in serve.status().applications else "gone"
    print(f"renewed: {renewed}, left alone: {left}")


if __name__ == "__main__":
    main()
