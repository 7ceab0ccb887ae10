"""A Ray job: engines that answer a block after a fixed time, one block at a time, and what the router makes of them.

Prints one line of JSON. The engines say who they are.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from airflow_provider_raylm.cluster.routing import numbered

APPLICATION = "routed"
BLOCK_S = 0.5


@serve.deployment(
    name="engine", max_ongoing_requests=100, health_check_period_s=2, ray_actor_options={"num_cpus": 0.05}
)
class FixedTimeEngine:
    def __init__(self):
        self.me = {"replica": serve.get_replica_context().replica_id.unique_id, "pid": os.getpid()}
        self.free = asyncio.Lock()

    async def run_block(self, *, question, rows, near=None):
        yield self.me
        async with self.free:
            await asyncio.sleep(BLOCK_S)
        yield rows

    async def ping(self):
        return self.me


def deploy(replicas, router):
    engine = FixedTimeEngine.options(num_replicas=replicas, request_router_config=router)
    serve.run(engine.bind(), name=APPLICATION, route_prefix=None)


def block(handle, near=None, rows=10):
    """Ask a block and return (who answered, whether it failed)."""
    stream = handle.options(stream=True).run_block.remote(question="{}", rows=rows, near=near)
    who = None
    try:
        who = next(stream)
        assert list(stream) == [rows]
        return who, False
    except Exception:
        return who, True


def until_done(handle, near=None):
    """Ask a block until it is answered; return who did it, and how often it failed."""
    failures = 0
    while True:
        who, failed = block(handle, near)
        if not failed:
            return who, failures
        failures += 1


def balance(handle, replicas, blocks_each):
    """Return the share of the linear rate with twice as many blocks in flight as there are replicas.

    So many blocks that one more or less at a replica when they end does not decide.
    """
    with ThreadPoolExecutor(2 * replicas) as pool:
        list(pool.map(lambda _: block(handle), range(2 * replicas)))
        begin = time.monotonic()
        done = list(pool.map(lambda _: block(handle)[0]["replica"], range(replicas * blocks_each)))
        took = time.monotonic() - begin
    return {"rate": blocks_each * BLOCK_S / took, "each": sorted(Counter(done).values())}


def main(router_class: str, *counts: str) -> None:
    router = RequestRouterConfig(request_router_class=router_class)
    said = {"balance": {}}
    for replicas in map(int, counts):
        deploy(replicas, router)
        handle = serve.get_deployment_handle("engine", APPLICATION)
        said["balance"][replicas] = balance(handle, replicas, 32)
    if "airflow_provider_raylm" in router_class:
        with ThreadPoolExecutor(2 * replicas) as pool:
            said |= places(pool, handle, replicas)
            said |= changes(pool, handle, replicas, router)
    print(json.dumps(said))
    serve.delete(APPLICATION)


def places(pool, handle, replicas):
    """Blocks of three steps, and numbered names."""
    steps = list(pool.map(lambda name: [block(handle, f"block {name}")[0]["replica"] for _ in range(3)], range(24)))
    numbers = list(pool.map(lambda i: block(handle, numbered(i % replicas))[0]["replica"], range(2 * replicas)))
    return {
        "steps_at_home": sum(later == before for one in steps for before, later in pairwise(one)) / (2 * len(steps)),
        "replicas_of_all_blocks": len({one for step in steps for one in step}),
        "replicas_per_number": max(len({numbers[i], numbers[i + replicas]}) for i in range(replicas)),
        "replicas_of_all_numbers": len(set(numbers)),
    }


def changes(pool, handle, replicas, router):
    """A replica that is killed, and one more."""
    said = {}
    home, _ = until_done(handle, "home")
    under_way = [pool.submit(until_done, handle, near) for near in ("home", "home", None, None)]
    time.sleep(BLOCK_S / 2)
    os.kill(home["pid"], signal.SIGKILL)
    outcomes = [one.result(timeout=60) for one in under_way]
    said["killed_answers"] = home["replica"] in {who["replica"] for who, _ in outcomes}
    again = [until_done(handle, "home") for _ in range(3)]
    said["homes_after_kill"] = len({who["replica"] for who, _ in again})
    said["failures_after_kill"] = sum(failures for _, failures in again)

    end = time.monotonic() + 60
    while serve.status().applications[APPLICATION].status != "RUNNING" and time.monotonic() < end:
        time.sleep(0.2)
    known = {who["replica"] for who, _ in pool.map(lambda _: until_done(handle), range(4 * replicas))}
    with ThreadPoolExecutor(1) as one:
        deploying = one.submit(deploy, replicas + 1, router)
        new = 0
        over = time.monotonic() + 120
        while new == 0 and time.monotonic() < over:
            up = deploying.done()
            blocks = range(2 * (replicas + 1))
            outcomes = list(pool.map(lambda i: until_done(handle, "home" if i % 2 else None), blocks))
            new = sum(who["replica"] not in known for who, _ in outcomes)
            if up:
                break
    said["new_replica_answers"] = new > 0
    return said


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    serve.start(proxy_location="Disabled")
    main(*sys.argv[1:])
