"""A Ray job that deploys an engine without vLLM: it answers every row in a while, and writes down what it is asked."""

import asyncio
import sys
from typing import Any

from ray import serve

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch.rows import Answer, Refusal

SECONDS = 0.7
# Characters beside which no answer fits, as for the tiny model.
TOO_LONG = 5_000


@serve.deployment(name="engine", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
class ScriptedEngine:
    def __init__(self, witness: str) -> None:
        self._witness = witness

    async def about(self) -> dict[str, object]:
        return {"version": __version__, "capacity": 128}

    async def ping(self) -> None:
        pass

    async def run_block(self, fields: str, contents: list[str], timeout: float, caller: object = None) -> list[Any]:
        with open(self._witness, "ab") as witness:
            witness.write(b"." * sum(len(content) < TOO_LONG for content in contents))
        await asyncio.sleep(SECONDS)
        too_long = Refusal("prompt_too_long", "too long")
        return [Answer("so", "stop", 1, 1) if len(content) < TOO_LONG else too_long for content in contents]

    async def run_block_alone(self, fields: str, contents: list[str], timeout: float, caller: object = None) -> Any:
        yield []
        yield await self.run_block(fields, contents, timeout)


if __name__ == "__main__":
    serve.start(proxy_location="Disabled")
    serve.run(ScriptedEngine.bind(sys.argv[2]), name=sys.argv[1], route_prefix=None)
