"""A Ray job that deploys an application as a version of this package did that knew neither ``ping`` nor ``about``."""

import sys

from ray import serve


@serve.deployment(name="engine", ray_actor_options={"num_cpus": 0.1})
class OldEngine:
    async def capacity(self) -> int:
        return 16

    async def run_block(self, fields: str, contents: list[str], timeout: float) -> list[object]:
        raise AssertionError("nothing is asked")


if __name__ == "__main__":
    serve.start(proxy_location="Disabled")
    serve.run(OldEngine.bind(), name=sys.argv[1], route_prefix=None)
