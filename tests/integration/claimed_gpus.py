"""Engines on GPUs that are only claimed: Ray counts what a node says it has, and vLLM asks Ray.

Run as a script, it makes a cluster of two nodes with a GPU each, deploys an engine's spec as the driver does, with a
replica that goes vLLM's way until its workers have a place, and prints where those of each replica are.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

FOLDER = "RAYLM_TEST_PLACES"
# vLLM is imported by a process of each replica, at the same time.
START_TIMEOUT_S = 240
FIT_TIMEOUT_S = 60


class Worker:
    """What vLLM would load a part of the model in."""

    def place(self):
        import ray

        context = ray.get_runtime_context()
        return [context.get_node_id(), context.get_accelerator_ids()["GPU"]]


def engine_process(spec, placement_group):
    """Ask for the workers where vLLM does, in a process of its own."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    from vllm.config import ParallelConfig
    from vllm.platforms import current_platform
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
    from vllm.v1.executor.ray_utils import get_bundles_sorted_by_node, initialize_ray_cluster

    # The build for CPUs knows no resource of Ray's; CUDA's and ROCm's name this one.
    type(current_platform).ray_device_key = "GPU"
    config = ParallelConfig(
        tensor_parallel_size=spec["tensor_parallel_size"],
        pipeline_parallel_size=spec["pipeline_parallel_size"],
        distributed_executor_backend="ray",
        placement_group=placement_group,
    )
    initialize_ray_cluster(config, require_gpu_on_driver=False)
    workers = [
        ray.remote(Worker)
        .options(
            num_cpus=0,
            **RayExecutorV2._get_actor_resource_kwargs(),
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group, bundle),
        )
        .remote()
        for bundle, _, _ in get_bundles_sorted_by_node(placement_group)
    ]
    return ray.get([worker.place.remote() for worker in workers], timeout=FIT_TIMEOUT_S)


class Replica:
    """What Serve starts instead of the engine."""

    def __init__(self, spec):
        from ray.util import get_current_placement_group
        from vllm.utils.system_utils import _maybe_force_spawn

        _maybe_force_spawn()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            asked = pool.apply_async(engine_process, (spec, get_current_placement_group()))
            places = asked.get(timeout=START_TIMEOUT_S)
        Path(os.environ[FOLDER], str(os.getpid())).write_text(json.dumps(places))


def main(specs):
    """Return the places of the workers of each replica of each engine."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from airflow_provider_raylm.cluster.engine import llm
    from airflow_provider_raylm.specs import EngineSpec

    node = {"num_cpus": 3, "num_gpus": 1, "resources": {"accelerator_type:H100": 1}}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found = {}
    try:
        cluster.add_node(**node)
        ray.init(cluster.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        for spec in specs:
            with tempfile.TemporaryDirectory() as folder, patch.object(llm, "_SERVER", f"{__spec__.name}.Replica"):
                engine = EngineSpec.model_validate({**spec, "model": "m", "env": {FOLDER: folder}})
                try:
                    serve.run(llm.llm_deployment(engine), name=engine.name, route_prefix=None)
                except RuntimeError:
                    print(serve.status().applications[engine.name].deployments, file=sys.stderr)
                    raise
                found[engine.name] = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
                serve.delete(engine.name)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
