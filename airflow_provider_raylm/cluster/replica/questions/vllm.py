"""One engine as vLLM has it: what it serves, and what its errors mean."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.chat_utils import ChatTemplateConfig
from vllm.entrypoints.pooling.factories import init_pooling_io_processors
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from airflow_provider_raylm.cluster.batch.exchange import Refusal
from airflow_provider_raylm.cluster.replica.stalls import Fit, Stalls
from airflow_provider_raylm.cluster.replica.texts import Texts
from airflow_provider_raylm.errors import EngineError

# The only codes that speak of one row: bad request, too large, unprocessable. Any other is the engine's trouble.
_ROW_ERROR_CODES = frozenset({400, 413, 422})
_TOO_LONG = re.compile(r"context length|maximum model length|longer than the maximum|too many tokens", re.I)
# A step of the engine takes seconds at most, and it answers between steps.
PING_TIMEOUT_S = 30.0


class Vllm:
    """What kinds of questions need of an engine.

    Args:
        engine: Ray's, which holds vLLM's client and its serving objects.
        ping: returns when the engine's scheduler has answered.
        tasks: what vLLM says that the model can do.
        fit: is told of the rows in the engine; see ``Stalls``.

    Attributes:
        engine: the same.
        client: vLLM's.
        adapters: its LoRA adapters by name, as vLLM asks for them.
        texts: its tokenizer, if that can be taken apart.
        stalls: bounds what rows may take.
        pooling_task: what a pooling model does, by vLLM's name; None of a model that generates.
    """

    def __init__(self, engine: Any, ping: Callable[[], Awaitable[None]], tasks: Sequence[str], fit: Fit) -> None:
        self.engine = engine
        self.client = engine._engine_client
        self.texts = Texts.of(self.client.tokenizer)
        self.stalls = Stalls(self.tokens, fit)
        # Adapters by name; a request's model is one, or the model itself.
        self.adapters: Mapping[str, Any] = engine._oai_models.lora_requests
        self._ping = ping
        config = self.client.vllm_config
        self.pooling_task = None if "generate" in tasks else config.model_config.get_pooling_task(tasks)
        self._processors: dict[str, Any] = {}
        if self.pooling_task is not None:
            self._processors = init_pooling_io_processors(tasks, config, self.client.renderer, ChatTemplateConfig())

    def tokens(self, request_ids: Collection[str]) -> dict[str, int]:
        """Return how many tokens the engine has given to each request so far: nothing else tells before its end."""
        counts: Counter[str] = Counter()
        for state in self.client.output_processor.request_states.values():
            if state.detokenizer:
                # Several answers to one request have a state each.
                counts[state.external_req_id] += state.detokenizer.num_output_tokens()
        return counts

    def serving(self, name: str, question: str) -> Any:
        """Return vLLM's part for a kind of question.

        Raises:
            ValueError: the model has none.
        """
        serving = getattr(self.engine, name, None)
        if serving is None:
            does = self.pooling_task or "generate"
            raise ValueError(
                f"the engine has no API for {question}: its model is loaded for {does!r} (EngineSpec.task)"
            )
        return serving

    def processor(self, name: Any, question: str) -> Any:
        """Return vLLM's part for a pooling task.

        Raises:
            ValueError: the model is for another one.
        """
        if name not in self._processors:
            does = self.pooling_task or "generate"
            raise ValueError(f"the engine cannot {question}: its model is loaded for {does!r} (EngineSpec.task).")
        return self._processors[name]

    @property
    def context(self) -> int:
        """How many tokens prompt and answer have room for together."""
        return int(self.client.vllm_config.model_config.max_model_len)

    async def refusal(self, error: Exception) -> Refusal:
        """Return an error as one row's refusal, by vLLM's own judgement; raise EngineError when it is not."""
        if isinstance(error, EngineError):
            raise error
        if isinstance(error, TimeoutError):
            await self._require_progress()
            return Refusal("timeout", str(error))
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return Refusal("invalid_request", f"{where}: {first['msg']}")
        return refusal_of(create_error_response(error).error)

    async def _require_progress(self) -> None:
        """Tell slow rows from an engine that hangs.

        Raises:
            EngineError: it is the engine.
        """
        try:
            await asyncio.wait_for(self._ping(), PING_TIMEOUT_S)
        except TimeoutError:
            raise EngineError(f"the engine hangs: its scheduler does not answer within {PING_TIMEOUT_S:g} s") from None


def refusal_of(error: Any) -> Refusal:
    """Return vLLM's error answer as one row's refusal.

    Raises:
        EngineError: it was not the row's fault.
    """
    if error.code not in _ROW_ERROR_CODES:
        # As an error of this package: the caller has no vllm to unpickle vLLM's own.
        raise EngineError(f"the engine answered {error.code} {error.type}: {error.message}")
    return Refusal("prompt_too_long" if _TOO_LONG.search(error.message) else "invalid_request", error.message)
