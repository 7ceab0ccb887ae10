"""A Ray job that deploys replicas with an engine's face, of which each answers a row in a fixed time."""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from airflow_provider_raylm.cluster.batch.exchange import Answer, Content
from airflow_provider_raylm.cluster.replica.admission import Enter
from airflow_provider_raylm.cluster.routing import RowsRouter
from tests.light_engine import LightEngine

CAPACITY = 16
ROW_S = 1.0


@serve.deployment(
    name="engine",
    ray_actor_options={"num_cpus": 0.05},
    max_ongoing_requests=1000,
    request_router_config=RequestRouterConfig(request_router_class=RowsRouter),
)
class FixedEngine(LightEngine):
    """Makes the file *began* when the first row of all enters."""

    def __init__(self, began: str) -> None:
        super().__init__(CAPACITY)
        self._began = Path(began)
        # Who is let in beyond that waits in the engine, as with vLLM.
        self._places = asyncio.Semaphore(CAPACITY)

    async def row(self, fields: dict[str, Any], content: Content, enter: Enter) -> Answer:
        async with enter():
            with suppress(FileExistsError):
                self._began.touch(exist_ok=False)
            async with self._places:
                await asyncio.sleep(ROW_S)
        return Answer("so", "stop", 1, fields["max_tokens"])


def main(application: str, replicas: str, began: str) -> None:
    serve.start(proxy_location="Disabled")
    engine = FixedEngine.options(num_replicas=int(replicas))  # type: ignore[attr-defined]
    serve.run(engine.bind(began), name=application, route_prefix=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
