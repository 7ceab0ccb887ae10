"""What the engine is asked for the rows of a block, and what its answers mean; in vLLM's terms, which end here.

vLLM's OpenAI layer validates a request and builds a response per row. Here what the rows share is validated once; per
row vLLM's own renderer is used, and the engine is asked below that layer.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from airflow_provider_raylm.cluster.batch.rows import Answer, Content, Outcome, Refusal
from airflow_provider_raylm.cluster.replica.admission import Enter
from airflow_provider_raylm.cluster.replica.serving import Row
from airflow_provider_raylm.cluster.replica.stalls import Stalls
from airflow_provider_raylm.cluster.replica.texts import Texts
from airflow_provider_raylm.errors import BatchError, EngineError

# The only codes that speak of one row: bad request, too large, unprocessable. Any other is the engine's trouble.
_ROW_ERROR_CODES = frozenset({400, 413, 422})
_TOO_LONG = re.compile(r"context length|maximum model length|longer than the maximum|too many tokens", re.I)
# A step of the engine takes seconds at most, and it answers between steps.
PING_TIMEOUT_S = 30.0


class Questions:
    """Asks one engine.

    Args:
        engine: Ray's, which holds vLLM's client and its serving objects.
        ping: returns when the engine's scheduler has answered.
    """

    def __init__(self, engine: Any, ping: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._client = engine._engine_client
        self._ping = ping
        self._texts = Texts.of(self._client.tokenizer)
        self._stalls = Stalls(self.tokens)

    def tokens(self, request_ids: Collection[str]) -> dict[str, int]:
        """Return how many tokens the engine has given to each request so far: nothing else tells before its end."""
        states = self._client.output_processor.request_states.values()
        return {state.external_req_id: state.detokenizer.num_output_tokens() for state in states if state.detokenizer}

    async def rows(self, fields: str, contents: list[Content], timeout: float | None) -> list[Row]:
        """Return what each row has to do; what many can do in one go is done."""
        try:
            question = self._question(json.loads(fields), chat=not isinstance(contents[0], str))
        except Exception as error:
            # All rows share it: asked a million times, it would be refused a million times.
            refusal = await self._refusal(error)
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
            return [
                partial(self._generate, question, f"{block}-{i}", inputs, timeout) for i, inputs in enumerate(rendered)
            ]
        return [partial(self._answer, question, f"{block}-{i}", one, timeout) for i, one in enumerate(contents)]

    def _question(self, fields: dict[str, Any], chat: bool) -> _Question:
        if chat:
            serving = self._serving("_oai_serving_chat", "messages")
            request = ChatCompletionRequest(messages=[{"role": "user", "content": "."}], **fields)
            render = serving.render_chat_request
        else:
            serving = self._serving("_oai_serving_completion", "prompt")
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
            decode = partial(self._texts.decoded, skip_special_tokens=sampling.skip_special_tokens)
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

    def _serving(self, name: str, question: str) -> Any:
        """Return vLLM's part for a kind of question.

        Raises:
            ValueError: the model has none.
        """
        serving = getattr(self._engine, name, None)
        if serving is None:
            raise ValueError(f"the model has no API for {question}.")
        return serving

    def _require_room(self, request: Any) -> None:
        """Refuse more new tokens than fit beside any prompt.

        Raises:
            ValueError: they do not.
        """
        context = self._client.vllm_config.model_config.max_model_len
        if request.max_tokens is not None and request.max_tokens >= context:
            raise ValueError(
                f"max_tokens is {request.max_tokens}, but prompt and answer together have room for {context} tokens "
                "(max_model_len)."
            )

    async def _answer(
        self, question: _Question, request_id: str, content: Content, timeout: float | None, enter: Enter
    ) -> Outcome:
        request = question.request.model_copy(update={question.field: content, "request_id": request_id})
        try:
            if question.parsed:
                # vLLM's chats have ids of their own form.
                async with enter(), self._stalls.bounded(f"chatcmpl-{request_id}", timeout):
                    response = await anext(self._engine.chat(request, None))
            else:
                response = await question.render(request)
        except Exception as error:
            return await self._refusal(error)
        # By shape: vLLM moves the class of its error answers between versions.
        if hasattr(response, "error"):
            return _refusal_of(response.error)
        if question.parsed:
            return _of_layer(response)
        # A chat is rendered to (conversation, inputs), a completion to inputs.
        (inputs,) = response[1] if isinstance(response, tuple) else response
        return await self._generate(question, request_id, inputs, timeout, enter)

    async def _generate(
        self, question: _Question, request_id: str, inputs: Any, timeout: float | None, enter: Enter
    ) -> Outcome:
        """Answer one row from what the engine takes: token ids, and what else belongs to them."""
        async with enter():
            try:
                async with self._stalls.bounded(request_id, timeout):
                    stream = self._client.generate(
                        inputs, question.sampling, request_id, priority=question.request.priority
                    )
                    outputs = [one async for one in stream]
            except Exception as error:
                return await self._refusal(error)
        # The sampling parameters ask for one answer, when it is complete.
        (output,) = outputs
        (answer,) = output.outputs
        if answer.finish_reason == "error":
            raise EngineError("the engine gave a request up with finish_reason 'error'")
        text = answer.text
        if question.decode is not None:
            # As in vLLM, the token that ended the answer is none of its text.
            ended = answer.finish_reason == "stop" and not question.sampling.include_stop_str_in_output
            text = await question.decode(answer.token_ids[:-1] if ended else answer.token_ids)
        prompt_tokens = len(output.prompt_token_ids or ())
        return Answer(text, answer.finish_reason or "", prompt_tokens, len(answer.token_ids))

    async def _refusal(self, error: Exception) -> Refusal:
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
        kinds = ("_oai_serving_completion", "_oai_serving_chat")
        judge = next(one for kind in kinds if (one := getattr(self._engine, kind, None)) is not None)
        return _refusal_of(judge.create_error_response(error).error)

    async def _require_progress(self) -> None:
        """Tell slow rows from an engine that hangs.

        Raises:
            EngineError: it is the engine.
        """
        try:
            await asyncio.wait_for(self._ping(), PING_TIMEOUT_S)
        except TimeoutError:
            raise EngineError(f"the engine hangs: its scheduler does not answer within {PING_TIMEOUT_S:g} s") from None


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
    decode: Callable[[list[int]], Awaitable[str]] | None
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
