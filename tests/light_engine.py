"""An engine's face, and behind it a coroutine for each row instead of vLLM: admission and parts are the real ones."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from ray import serve

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch.exchange import Answer, Content, Outcome, Part, unpacked
from airflow_provider_raylm.cluster.replica.admission import Admission, Enter
from airflow_provider_raylm.cluster.replica.callers import Callers
from airflow_provider_raylm.cluster.replica.serving import in_parts


class LightEngine:
    """To be a Serve deployment; overrides say how a row is answered."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.admission = Admission(capacity)
        self.callers = Callers()

    async def about(self) -> dict[str, object]:
        return {
            "version": __version__,
            "replica": self.replica,
            "capacity": self.capacity,
            "cache_tokens": 1_000_000,
            "tasks": self.admission.tasks,
        }

    async def ping(self) -> None:
        pass

    async def run_block(
        self,
        *pieces: bytes,
        question: str,
        rows: int,
        task: str,
        timeout: float | None,
        caller: Any = None,
        alone: bool = False,
        near: str | None = None,
    ) -> AsyncGenerator[Part]:
        fields = json.loads(question)["fields"]
        with self.callers.waiting(caller), self.admission.block(task, alone) as door:
            block = [partial(self.row, fields, request.content) for request in unpacked(pieces)]
            async with aclosing(in_parts(self.replica, block, self.admission, door)) as parts:
                async for part in parts:
                    yield part

    async def row(self, fields: dict[str, Any], content: Content, enter: Enter) -> Outcome:
        async with enter():
            return Answer("so", "stop", 1, 1)
