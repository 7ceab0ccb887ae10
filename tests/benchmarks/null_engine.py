"""A Ray job that deploys an application with an engine's face and nothing behind it: every row is answered at once."""

import json
import sys

from ray import serve

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch.rows import Answer


@serve.deployment(name="engine", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
class NullEngine:
    async def about(self) -> dict[str, object]:
        return {"version": __version__, "capacity": 1024}

    async def ping(self) -> None:
        pass

    async def run_block(self, fields: str, contents: list[str], timeout: float, caller: object = None) -> list[Answer]:
        return [Answer("nothing", "stop", 1, json.loads(fields)["max_tokens"])] * len(contents)


def main(application: str) -> None:
    serve.start(proxy_location="Disabled")
    serve.run(NullEngine.bind(), name=application, route_prefix=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
