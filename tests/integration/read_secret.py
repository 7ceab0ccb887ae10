"""A Ray job whose task is given a secret as the engine's helpers are; prints what the task found, back to front."""

import os
import sys

import ray

from airflow_provider_raylm.cluster.replica.secret_env import loaded_by_workers


@ray.remote(num_cpus=0)
def find() -> str:
    return os.environ["HF_TOKEN"][::-1]


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    files = loaded_by_workers({"HF_TOKEN": sys.argv[1]})
    print("found", ray.get(find.options(runtime_env={"env_vars": files}).remote()))
