"""What runs a cluster's jobs instead of Python, so that their engines autoscale within seconds instead of minutes.

``python -m tests.chaos.quick_scaling -m airflow_provider_raylm.cluster deploy`` is the package's own job but for that.
"""

import runpy
import sys
from dataclasses import replace

from ray import serve

# Serve waits half a minute before it adds a replica, and ten before it takes one away.
QUICK = {"upscale_delay_s": 1, "downscale_delay_s": 3, "metrics_interval_s": 1, "look_back_period_s": 3}


def quickly_scaling(cluster):
    """Return the cluster as one whose jobs deploy engines that autoscale within seconds."""
    return replace(cluster, python=f"python -m {__spec__.name}{cluster.python.removeprefix('python')}")


def _quickly(deployment):
    def quick(*arguments, autoscaling_config=None, **options):
        if autoscaling_config is not None:
            options["autoscaling_config"] = {**autoscaling_config, **QUICK}
        return deployment(*arguments, **options)

    return quick


if __name__ == "__main__":
    serve.deployment = _quickly(serve.deployment)
    # Behind "-m": the module, as its own name, and its arguments.
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
