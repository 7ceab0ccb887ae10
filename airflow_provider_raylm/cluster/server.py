"""The deployment that answers blocks of rows: Ray's own LLM server plus one method.

One handle call per row costs more than a small model's answer, and so does vLLM's OpenAI layer: it validates a request
and builds a response per row. ``run_block`` validates what the rows of a block share once; per row it uses vLLM's own
renderer and asks the engine below that layer. Inside, every row is an ordinary vLLM request, so the engine batches.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.constants import ENV_VARS_TO_PROPAGATE
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster import secret_env
from airflow_provider_raylm.cluster.batch.rows import Answer, Content, Refusal
from airflow_provider_raylm.cluster.callers import Callers
from airflow_provider_raylm.cluster.gate import Gate
from airflow_provider_raylm.cluster.llm import llm_config
from airflow_provider_raylm.cluster.texts import Texts
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.specs import EngineSpec

# The only codes that speak of one row: bad request, too large, unprocessable. Any other is the engine's trouble.
_ROW_ERROR_CODES = frozenset({400, 413, 422})
_TOO_LONG = re.compile(r"context length|maximum model length|longer than the maximum|too many tokens", re.I)
# A step of the engine takes seconds at most, and it answers between steps.
PING_TIMEOUT_S = 30.0
_ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception): .+)")


class NodeStart(CallbackBase):
    """What Ray does on the engine's nodes before the engine starts: download the model, and load its configuration.

    Takes two keyword arguments: ``secret_env``, the EngineSpec's, and ``download``, False for a model that lies on a
    path of the cluster. Ray would start a process on every node, which imports vLLM, to find that there is nothing to
    download.
    """

    async def on_before_node_init(self) -> None:
        """Let Ray's helpers read the secrets themselves, and leave out a download of nothing."""
        self.ctx.run_init_node = self.kwargs["download"]
        # Ray copies the values of HF_TOKEN and its like into the helpers' runtime_env, which its state API shows.
        shown = {
            name: value
            for name, value in (self.ctx.runtime_env or {}).get("env_vars", {}).items()
            if name not in ENV_VARS_TO_PROPAGATE
        }
        env_vars = {**shown, **secret_env.loaded_by_workers(self.kwargs["secret_env"])}
        self.ctx.runtime_env = {**(self.ctx.runtime_env or {}), "env_vars": env_vars}


class BlockLLMServer(LLMServer):
    """An LLM server whose unit of work is a block of requests."""

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine.

        Args:
            spec: the EngineSpec as JSON values.

        Raises:
            EngineError: it did not start; the text carries vLLM's own reason.
        """
        engine = EngineSpec.model_validate(spec)
        # vLLM's processes inherit it; Ray would show an environment of its own to whoever looks at the replica.
        secret_env.load(engine.secret_env)
        log_starts = _log_sizes()
        self._gate = Gate()
        self._callers = Callers()
        try:
            await super().__init__(llm_config(engine))
        except Exception as error:
            reason = _reason(error)
            if "engine core" in reason.lower():
                # vLLM's engine process dies with its reason printed, not raised.
                reason = _last_error(log_starts) or reason
            raise EngineError(reason) from None
        self._texts = Texts.of(self.engine._oai_serving_completion.renderer.tokenizer)

    async def about(self) -> dict[str, Any]:
        """Return the version of this package, and how many requests the engine works on at a time at most.

        The latter is vLLM's ``max_num_seqs``, of this replica.
        """
        scheduler = self.engine._engine_client.vllm_config.scheduler_config
        return {"version": __version__, "capacity": int(scheduler.max_num_seqs)}

    async def ping(self) -> None:
        """Return when the engine's scheduler has answered; vLLM's own health check only sees a process that is gone.

        Raises:
            EngineError: the engine is dead.
        """
        try:
            await self.engine._engine_client.is_sleeping()
        except Exception as error:
            raise EngineError(_reason(error)) from None

    async def check_health(self) -> None:
        """Let Serve replace this replica when its engine is dead, or hangs for as long as Serve waits for a check."""
        await super().check_health()
        await self.ping()

    async def run_block(
        self, fields: str, contents: list[Content], timeout: float, caller: Any = None
    ) -> list[Answer | Refusal]:
        """Answer one request per element of *contents*, in their order.

        A row that was refused, or took longer than *timeout* seconds, is a ``Refusal``. Cancelling the call aborts
        what is still running, and so does the caller's death.

        Args:
            fields: what the requests share: an OpenAI request as JSON text, without prompt or messages.
            contents: a prompt (completion request) or messages (chat request) for each row.
            timeout: seconds.
            caller: handle of the actor that waits for the answers.

        Raises:
            EngineError: the engine failed in a way that is not one row's fault.
            BatchError: it refuses what the requests share.
        """
        with self._callers.waiting(caller):
            async with self._gate.passed(alone=False):
                return await self._answers(fields, contents, timeout)

    async def run_block_alone(
        self, fields: str, contents: list[Content], timeout: float, caller: Any = None
    ) -> AsyncIterator[list[Answer | Refusal]]:
        """Answer as ``run_block`` does, while no other block is being answered; if the engine fails, it was this one.

        Yields nothing to say that it begins, then the answers.
        """
        with self._callers.waiting(caller):
            async with self._gate.passed(alone=True):
                # Whoever was inside before may have killed the engine; that is not this block's doing.
                await self.ping()
                yield []
                yield await self._answers(fields, contents, timeout)

    async def _answers(self, fields: str, contents: list[Content], timeout: float) -> list[Answer | Refusal]:
        try:
            question = self._question(json.loads(fields), chat=not isinstance(contents[0], str))
        except Exception as error:
            # All rows share it: asked a million times, it would be refused a million times.
            refusal = self._refusal(error)
            raise BatchError(
                f"The engine refuses what the spec asks of every row: {refusal.message} Nothing was asked; correct the "
                "spec and retry."
            ) from None
        rendered: list[Any] | None = None
        if question.encode is not None:
            # If one cannot be tokenised, or rendered, none is: one by one, it is that row's fault alone.
            with suppress(Exception):
                contents = await asyncio.to_thread(question.encode, contents)
                rendered = await question.render(question.request.model_copy(update={question.field: contents}))
        block = uuid4().hex
        if isinstance(rendered, list):
            rows = [self._generate(question, f"{block}-{i}", inputs) for i, inputs in enumerate(rendered)]
        else:
            rows = [self._answer(question, f"{block}-{i}", content) for i, content in enumerate(contents)]
        tasks = [asyncio.create_task(row) for row in rows]
        try:
            _, late = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task not in late:
                    task.result()
            if late:
                await self._require_progress()
            too_late = Refusal("timeout", f"no answer within {timeout:g} s")
            return [too_late if task in late else task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    async def _require_progress(self) -> None:
        """Tell slow rows from an engine that hangs.

        Raises:
            EngineError: it is the engine.
        """
        try:
            await asyncio.wait_for(self.ping(), PING_TIMEOUT_S)
        except TimeoutError:
            raise EngineError(f"the engine hangs: its scheduler does not answer within {PING_TIMEOUT_S:g} s") from None

    def _question(self, fields: dict[str, Any], chat: bool) -> _Question:
        if chat:
            serving = self.engine._oai_serving_chat
            request = ChatCompletionRequest(messages=[{"role": "user", "content": "."}], **fields)
            render = serving.render_chat_request
        else:
            serving = self.engine._oai_serving_completion
            request = CompletionRequest(prompt=".", **fields)
            render = serving.render_completion_request
        self._require_room(request)
        limits = [limit for limit in (request.max_tokens, serving.override_max_tokens) if limit is not None]
        sampling = request.to_sampling_params(min(limits), serving.default_sampling_params)
        encode = decode = None
        # In one go where nothing is cut off, which vLLM's renderer does while it tokenises.
        if self._texts is not None and not chat and request.truncate_prompt_tokens is None:
            encode = partial(self._texts.encode, add_special_tokens=request.add_special_tokens)
        # vLLM looks for stop strings in the text as it grows.
        if self._texts is not None and self._texts.decodes and not sampling.stop:
            sampling.detokenize = False
            decode = partial(self._texts.decode, skip_special_tokens=sampling.skip_special_tokens)
        return _Question(
            request,
            field="messages" if chat else "prompt",
            # What a reasoning or tool parser changes in a request and takes from its answer is vLLM's own affair.
            parsed=chat and serving.parser_cls is not None,
            encode=encode,
            decode=decode,
            render=render,
            sampling=sampling,
        )

    def _require_room(self, request: Any) -> None:
        """Refuse more new tokens than fit beside any prompt.

        Raises:
            ValueError: they do not.
        """
        context = self.engine._engine_client.vllm_config.model_config.max_model_len
        if request.max_tokens is not None and request.max_tokens >= context:
            raise ValueError(
                f"max_tokens is {request.max_tokens}, but prompt and answer together have room for {context} tokens "
                "(max_model_len)."
            )

    async def _answer(self, question: _Question, request_id: str, content: Content) -> Answer | Refusal:
        request = question.request.model_copy(update={question.field: content, "request_id": request_id})
        try:
            response = await (anext(self.engine.chat(request, None)) if question.parsed else question.render(request))
        except Exception as error:
            return self._refusal(error)
        # By shape: vLLM moves the class of its error answers between versions.
        if hasattr(response, "error"):
            return _refusal_of(response.error)
        if question.parsed:
            return _of_layer(response)
        # A chat is rendered to (conversation, inputs), a completion to inputs.
        (inputs,) = response[1] if isinstance(response, tuple) else response
        return await self._generate(question, request_id, inputs)

    async def _generate(self, question: _Question, request_id: str, inputs: Any) -> Answer | Refusal:
        """Answer one row from what the engine takes: token ids, and what else belongs to them."""
        try:
            stream = self.engine._engine_client.generate(
                inputs, question.sampling, request_id, priority=question.request.priority
            )
            outputs = [one async for one in stream]
        except Exception as error:
            return self._refusal(error)
        # The sampling parameters ask for one answer, when it is complete.
        (output,) = outputs
        (answer,) = output.outputs
        if answer.finish_reason == "error":
            raise EngineError("the engine gave a request up with finish_reason 'error'")
        text = answer.text
        if question.decode is not None:
            # As in vLLM, the token that ended the answer is none of its text.
            ended = answer.finish_reason == "stop" and not question.sampling.include_stop_str_in_output
            text = question.decode(answer.token_ids[:-1] if ended else answer.token_ids)
        prompt_tokens = len(output.prompt_token_ids or ())
        return Answer(text, answer.finish_reason or "", prompt_tokens, len(answer.token_ids))

    def _refusal(self, error: Exception) -> Refusal:
        """Return an error as one row's refusal, by vLLM's own judgement; raise EngineError when it is not."""
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return Refusal("invalid_request", f"{where}: {first['msg']}")
        return _refusal_of(self.engine._oai_serving_completion.create_error_response(error).error)

    async def __del__(self) -> None:
        """End the engine's processes; Serve calls this when the replica stops in good order."""
        client = getattr(getattr(self, "engine", None), "_engine_client", None)
        if client is not None:
            client.shutdown()
        await super().__del__()


@dataclass(frozen=True)
class _Question:
    """What the rows of a block share, in vLLM's terms.

    Attributes:
        request: the OpenAI request; a row's differs in one field.
        field: that field.
        parsed: whether rows go through the OpenAI layer, because the engine has a parser for its answers.
        encode: from a block of prompts to token ids in one go, which a chat's template leaves no room for.
        decode: from an answer's token ids to its text in one go; without it, vLLM does so token by token.
        render: from a request to the engine's inputs, by chat template and tokenizer.
        sampling: vLLM's sampling parameters.
    """

    request: Any
    field: str
    parsed: bool
    encode: Callable[[list[Any]], list[Any]] | None
    decode: Callable[[list[int]], str] | None
    render: Callable[[Any], Awaitable[Any]]
    sampling: Any


def _of_layer(response: Any) -> Answer:
    (choice,) = response.choices
    usage = response.usage
    return Answer(
        choice.message.content or "", choice.finish_reason or "", usage.prompt_tokens, usage.completion_tokens
    )


def _refusal_of(error: Any) -> Refusal:
    """Return vLLM's error answer as one row's refusal.

    Raises:
        EngineError: it was not the row's fault.
    """
    if error.code not in _ROW_ERROR_CODES:
        # As an error of this package: the caller has no vllm to unpickle vLLM's own.
        raise EngineError(f"the engine answered {error.code} {error.type}: {error.message}")
    return Refusal("prompt_too_long" if _TOO_LONG.search(error.message) else "invalid_request", error.message)


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
