"""A Ray job: an application under a lease lives while it is renewed and is gone soon after."""

import time

import ray
from ray import serve

from airflow_provider_raylm.cluster.lease import CHECK_PERIOD_S, LeaseKeeper

NAME = "raylm-lease-test"
LABELS = {"installation": "lease", "dag_id": "d", "run_id": "r", "engine": "e"}


@serve.deployment(name="engine", ray_actor_options={"num_cpus": 0})
class Nothing:
    """Stands where the engine would."""


def main() -> None:
    ray.init()
    serve.start(proxy_location="Disabled")
    now = time.time()
    keeper = serve.deployment(LeaseKeeper, name="lease-test").options(ray_actor_options={"num_cpus": 0})
    bounds = {"idle_timeout": 4.0, "max_lifetime": 600.0}
    handle = serve.run(keeper.bind(NAME, LABELS, bounds, now, now + 600, Nothing.bind()), name=NAME, route_prefix=None)
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
