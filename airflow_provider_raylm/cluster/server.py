"""The deployment that answers blocks of rows: Ray's own LLM server plus one method.

One handle call per row costs more than a small model's answer. ``run_block`` takes many requests in one call and
streams each answer back as it is ready; inside, every row is an ordinary vLLM request, so the engine batches them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from airflow_provider_raylm.errors import EngineError

# The only codes that speak of one row: bad request, too large, unprocessable. Any other is the engine's trouble.
_ROW_ERROR_CODES = frozenset({400, 413, 422})
_TOO_LONG = re.compile(r"context length|maximum model length|longer than the maximum|too many tokens", re.I)
_ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception): .+)")


class NothingToDownload(CallbackBase):
    """For a model that lies on a path of the cluster.

    Ray would start a process on every node of the engine that imports vLLM to find that there is nothing to download.
    """

    async def on_before_node_init(self) -> None:
        """Leave that step out."""
        self.ctx.run_init_node = False


class BlockLLMServer(LLMServer):
    """An LLM server whose unit of work is a block of requests."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine.

        Raises:
            EngineError: it did not start; the text carries vLLM's own reason.
        """
        log_starts = _log_sizes()
        try:
            await super().__init__(llm_config, **kwargs)
        except Exception as error:
            reason = _reason(error)
            if "engine core" in reason.lower():
                # vLLM's engine process dies with its reason printed, not raised.
                reason = _last_error(log_starts) or reason
            raise EngineError(reason) from None
        self._requests = 0

    async def run_block(self, requests: list[str], timeout: float) -> AsyncIterator[list[str]]:
        """Answer *requests* (OpenAI requests as JSON text) and yield outcomes as they finish.

        An outcome is JSON text: ``{"index", "text", "finish_reason", "prompt_tokens", "completion_tokens"}``, or
        ``{"index", "reason", "message"}`` for a row that was refused or took longer than *timeout* seconds. Outcomes
        that are ready together are yielded together. Ending the iteration early aborts what is still running.

        Raises:
            EngineError: the engine failed in a way that is not one row's fault.
        """
        finished: asyncio.Queue[asyncio.Task[str]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._answer(i, text, timeout)) for i, text in enumerate(requests)]
        for task in tasks:
            task.add_done_callback(finished.put_nowait)
        try:
            left = len(tasks)
            while left:
                ready = [(await finished.get()).result()]
                while not finished.empty():
                    ready.append(finished.get_nowait().result())
                left -= len(ready)
                yield ready
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, index: int, text: str, timeout: float) -> str:
        try:
            async with asyncio.timeout(timeout):
                outcome = await self._ask(json.loads(text))
        except TimeoutError:
            outcome = {"reason": "timeout", "message": f"no answer within {timeout:g} s"}
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            outcome = {"reason": "invalid_request", "message": f"{where}: {first['msg']}"}
        except EngineError:
            raise
        except Exception as error:
            # As an error of this package: the caller has no vllm to unpickle vLLM's own.
            raise EngineError(f"the engine failed: {type(error).__name__}: {error}") from None
        self._requests += 1
        return json.dumps({"index": index, **outcome})

    async def _ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        # Straight to the engine: LLMServer.chat would stamp the handle call's request id on every row of the block.
        if "messages" in fields:
            stream = self.engine.chat(ChatCompletionRequest.model_validate(fields), None)
        else:
            stream = self.engine.completions(CompletionRequest.model_validate(fields), None)
        response = await anext(stream)
        # By shape: the engine answers with a base class of the one that ray.serve.llm exports.
        error = getattr(response, "error", None)
        if error is not None:
            if error.code not in _ROW_ERROR_CODES:
                raise EngineError(f"the engine answered {error.code} {error.type}: {error.message}")
            reason = "prompt_too_long" if _TOO_LONG.search(error.message) else "invalid_request"
            return {"reason": reason, "message": error.message}
        choice = response.choices[0]
        return {
            "text": (choice.message.content if "messages" in fields else choice.text) or "",
            "finish_reason": choice.finish_reason or "",
            "prompt_tokens": response.usage.prompt_tokens,
            "completion_tokens": response.usage.completion_tokens,
        }

    async def __del__(self) -> None:
        """End the engine's processes; Serve calls this when the replica stops in good order."""
        client = getattr(getattr(self, "engine", None), "_engine_client", None)
        if client is not None:
            client.shutdown()
        await super().__del__()


def _reason(error: BaseException) -> str:
    """Return the innermost sentence of a nested failure."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _own_logs() -> list[Path]:
    """Return the files that this process's output goes to; its children inherit them."""
    found = (Path(os.readlink(f"/proc/self/fd/{fd}")) for fd in (1, 2) if os.path.exists(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.is_file()]


def _log_sizes() -> dict[Path, int]:
    return {path: path.stat().st_size for path in _own_logs()}


def _last_error(since: dict[Path, int]) -> str | None:
    """Return the first error that was printed since the given sizes, other than the one that wraps it."""
    for path, start in since.items():
        with path.open("rb") as log:
            log.seek(start)
            text = log.read(1 << 20).decode(errors="replace")
        causes = [m for m in _ERROR_LINE.findall(text) if "engine core" not in m.lower()]
        if causes:
            return str(causes[0])
    return None
