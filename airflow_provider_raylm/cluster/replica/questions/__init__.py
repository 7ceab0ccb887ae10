"""What the engine is asked for the rows of a block, by one class for each kind of question. vLLM's terms end here.

vLLM's OpenAI layer validates a request and builds a response per row. Here what the rows share is validated once; per
row vLLM's own renderer is used, and the engine is asked below that layer.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from airflow_provider_raylm.cluster.batch.exchange import Request
from airflow_provider_raylm.cluster.replica.questions.generation import Chat, Completion
from airflow_provider_raylm.cluster.replica.questions.pooling import Classify, Embed, Score
from airflow_provider_raylm.cluster.replica.questions.vllm import Vllm
from airflow_provider_raylm.cluster.replica.serving import Row
from airflow_provider_raylm.cluster.replica.stalls import Fit
from airflow_provider_raylm.errors import BatchError


class Kind(Protocol):
    """What the rows of a block share; made from the engine, the fields of an OpenAI request, and what is to be kept.

    Raises:
        Exception: vLLM's own, of what it refuses.
    """

    def __init__(self, vllm: Vllm, fields: dict[str, Any], keep: Sequence[str]) -> None:
        """Check it all."""

    async def rows(self, requests: Sequence[Request], timeout: float | None) -> list[Row]:
        """Return what each row has to do; what many can do in one go is done."""


KINDS: dict[str, type[Kind]] = {
    "completion": Completion,
    "chat": Chat,
    "embed": Embed,
    "classify": Classify,
    "score": Score,
}


class Questions:
    """Asks one engine.

    Args:
        engine: Ray's, which holds vLLM's client and its serving objects.
        ping: returns when the engine's scheduler has answered.
        tasks: what vLLM says that the model can do.
        fit: is told of the rows in the engine; see ``Stalls``.
    """

    def __init__(self, engine: Any, ping: Callable[[], Awaitable[None]], tasks: Sequence[str], fit: Fit) -> None:
        self._vllm = Vllm(engine, ping, tasks, fit)

    async def rows(self, question: str, requests: Sequence[Request], timeout: float | None) -> list[Row]:
        """Return what each row of a block has to do.

        Args:
            question: what they share, as JSON text: ``kind``, ``fields`` of the OpenAI request, and what to ``keep``.
            requests: what is each row's own.
            timeout: seconds that a row may be in the engine; None for as long as it gets tokens.

        Raises:
            BatchError: the engine refuses what they share.
        """
        told = json.loads(question)
        try:
            kind = KINDS[told["kind"]](self._vllm, told["fields"], told["keep"])
        except Exception as error:
            # All rows share it: asked a million times, it would be refused a million times.
            refusal = await self._vllm.refusal(error)
            raise BatchError(
                f"The engine refuses what the spec asks of every row: {refusal.message} Nothing was asked; correct the "
                "spec and retry."
            ) from None
        return await kind.rows(requests, timeout)
