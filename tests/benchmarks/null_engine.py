"""A Ray job that deploys an application with an engine's face and nothing behind it: every row is answered at once."""

import json
import sys
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve

from airflow_provider_raylm.cluster.batch.exchange import Answer, Part, unpacked
from tests.light_engine import LightEngine


@serve.deployment(name="engine", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
class NullEngine(LightEngine):
    def __init__(self) -> None:
        super().__init__(capacity=1024)

    async def run_block(self, *pieces: bytes, question: str, **_: Any) -> AsyncGenerator[Part]:
        answer = Answer("nothing", "stop", 1, json.loads(question)["fields"]["max_tokens"])
        yield Part(self.replica, begun=True, outcomes=[(number, answer) for number in range(len(unpacked(pieces)))])


def main(application: str) -> None:
    serve.start(proxy_location="Disabled")
    serve.run(NullEngine.bind(), name=application, route_prefix=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
