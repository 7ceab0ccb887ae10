"""Completions and chats: text that the model writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar
from uuid import uuid4

from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType

from airflow_provider_raylm.cluster.batch.exchange import Content, Outcome, Refusal, Request
from airflow_provider_raylm.cluster.replica.admission import Enter
from airflow_provider_raylm.cluster.replica.questions import answers
from airflow_provider_raylm.cluster.replica.questions.vllm import Vllm, refusal_of
from airflow_provider_raylm.cluster.replica.serving import Row
from airflow_provider_raylm.errors import EngineError
from airflow_provider_raylm.specs import Step


class Generation:
    """What the rows of a block share.

    Attributes:
        field: of the OpenAI request, in which rows differ.
    """

    field: ClassVar[str]
    _part: ClassVar[str]
    _type: ClassVar[Any]
    _example: ClassVar[Any]

    def __init__(self, vllm: Vllm, fields: dict[str, Any], keep: Sequence[str]) -> None:
        self._vllm = vllm
        self._fields = fields
        self._keep = keep
        self._others: dict[str, Generation | Exception] = {}
        self._serving = vllm.serving(self._part, self.field)
        self._require_known(fields)
        self._adapter = vllm.adapters.get(fields["model"])
        if self._adapter is None and not self._serving.models.is_base_model(fields["model"]):
            has = ", ".join(vllm.adapters) or "none"
            raise ValueError(f"adapter {fields['model']!r}: the engine has {has} (EngineSpec.adapters).")
        self._request = self._type(**{self.field: self._example}, **fields)
        self._require_room()
        limits = [one for one in (self._request.max_tokens, self._serving.override_max_tokens) if one is not None]
        # Of a chat there is none where each row tells its own.
        limit = min(limits, default=self._vllm.context)
        self._sampling = self._request.to_sampling_params(limit, self._serving.default_sampling_params)
        if self._sampling.sampling_type == SamplingType.RANDOM_SEED and current_platform.is_cpu():
            # It rewinds a row's generator, which torch's on CPUs cannot: the engine would die of one such row.
            raise ValueError("seed: vLLM's engine on CPUs dies of it (vllm 0.29); leave it out, or set temperature=0.")
        named = self._sampling.num_logprobs is not None
        if "logprobs" in keep and not named:
            raise ValueError("keep='logprobs': but logprobs, or of a chat top_logprobs, asks for none; give a number.")
        # From an answer's token ids to its text in one go; without it, vLLM does so token by token.
        self._decode: Callable[[list[int]], Awaitable[str]] | None = None
        # vLLM looks for stop strings in the text as it grows, and names the tokens of log probabilities.
        whole = not self._sampling.stop and not named
        if whole and vllm.texts is not None and vllm.texts.decodes:
            self._sampling.detokenize = False
            self._decode = partial(vllm.texts.decoded, skip_special_tokens=self._sampling.skip_special_tokens)

    async def rows(self, requests: Sequence[Request], timeout: float | None) -> list[Row]:
        """Return what each row has to do; what many can do in one go is done."""
        block = uuid4().hex
        rendered = await self._rendered(requests)
        return [
            partial(self._row, f"{block}-{i}", request, inputs, timeout)
            for i, (request, inputs) in enumerate(zip(requests, rendered, strict=True))
        ]

    async def _rendered(self, requests: Sequence[Request]) -> Sequence[Any]:
        """Return what the engine takes for each row; None where a row has to be rendered by itself."""
        return [None] * len(requests)

    async def _row(
        self, request_id: str, request: Request, inputs: Any, timeout: float | None, enter: Enter
    ) -> Outcome:
        try:
            asked = self._with(request.overrides)
            if inputs is None:
                outcome = await asked._answer(request_id, request.content, timeout, enter)
                return await asked._marked(request.content, outcome)
        except Exception as error:
            return await self._vllm.refusal(error)
        return await asked._generate(request_id, inputs, timeout, enter)

    def _with(self, overrides: str) -> Generation:
        """Return this question as a row has it, with its own values of some fields.

        Raises:
            Exception: vLLM's own, of a value that it refuses.
        """
        if not overrides:
            return self
        if overrides not in self._others:
            try:
                fields = {**self._fields, **json.loads(overrides)}
                self._others[overrides] = type(self)(self._vllm, fields, self._keep)
            except Exception as error:
                self._others[overrides] = error
        found = self._others[overrides]
        if isinstance(found, Exception):
            raise found
        return found

    def _require_known(self, fields: dict[str, Any]) -> None:
        """Refuse fields that vLLM would leave aside without a word.

        Raises:
            ValueError: there is one; the text has the nearest name.
        """
        known = set(self._type.model_fields)
        for name in fields:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise ValueError(
                    f"extra_body.{name}: vLLM has no such field of a {self.field} request"
                    + (f"; is it {near[0]}?" if near else ".")
                )

    def _require_room(self) -> None:
        """Refuse more new tokens than fit beside any prompt.

        Raises:
            ValueError: they do not.
        """
        context, wanted = self._vllm.context, self._request.max_tokens
        if wanted is not None and wanted >= context:
            raise ValueError(
                f"max_tokens is {wanted}, but prompt and answer together have room for {context} tokens "
                "(max_model_len)."
            )

        cut = self._request.truncate_prompt_tokens
        if cut is not None and cut > context - (wanted or 0):
            raise ValueError(
                f"truncate_prompt_tokens is {cut}, but beside max_tokens a prompt has room for "
                f"{context - (wanted or 0)} tokens (max_model_len)."
            )

    async def _marked(self, content: Content, outcome: Outcome) -> Outcome:
        """Say of an answer whether its prompt was cut, which vLLM does not: whether it is longer without the limit."""
        limit = self._request.truncate_prompt_tokens
        if limit is None or isinstance(outcome, Refusal):
            return outcome
        if limit < 0:
            limit = self._vllm.context - self._request.max_tokens
        if outcome.prompt_tokens < limit:
            return outcome
        whole = self._of("", content).model_copy(update=dict.fromkeys(Step.truncation_fields))
        try:
            (inputs,) = await self._render(whole)
            longer = len(inputs["prompt_token_ids"]) > limit
        except Exception:
            # What can be rendered with the limit, and cannot be without, is too long.
            longer = True
        return replace(outcome, truncated=longer)

    async def _answer(self, request_id: str, content: Content, timeout: float | None, enter: Enter) -> Outcome:
        """Answer one row from what it asks."""
        inputs = await self._render(self._of(request_id, content))
        # By shape: vLLM moves the class of its error answers between versions.
        if hasattr(inputs, "error"):
            return refusal_of(inputs.error)
        (one,) = inputs
        return await self._generate(request_id, one, timeout, enter)

    def _of(self, request_id: str, content: Content) -> Any:
        """Return a row's OpenAI request."""
        return self._request.model_copy(update={self.field: content, "request_id": request_id})

    async def _render(self, request: Any) -> Any:
        """Return what the engine takes for a request's prompts, or vLLM's error answer."""
        raise NotImplementedError

    async def _generate(self, request_id: str, inputs: Any, timeout: float | None, enter: Enter) -> Outcome:
        """Answer one row from what the engine takes: token ids, and what else belongs to them."""
        async with enter():
            try:
                async with self._vllm.stalls.bounded(request_id, timeout):
                    stream = self._vllm.client.generate(
                        inputs,
                        self._sampling,
                        request_id,
                        lora_request=self._adapter,
                        priority=self._request.priority,
                    )
                    outputs = [one async for one in stream]
            except Exception as error:
                return await self._vllm.refusal(error)
        # The sampling parameters ask for all answers at once, when they are complete.
        (output,) = outputs
        if any(one.finish_reason == "error" for one in output.outputs):
            raise EngineError("the engine gave a request up with finish_reason 'error'")
        texts = [await self._text(one) for one in output.outputs]
        return answers.of_output(output, texts, self._keep)

    async def _text(self, answer: Any) -> str:
        if self._decode is None:
            return str(answer.text)
        # As in vLLM, the token that ended the answer is none of its text.
        ended = answer.finish_reason == "stop" and not self._sampling.include_stop_str_in_output
        return await self._decode(answer.token_ids[:-1] if ended else answer.token_ids)


class Completion(Generation):
    """A prompt that the model continues."""

    field = "prompt"
    _part = "_oai_serving_completion"
    _type = CompletionRequest
    _example = "."

    async def _rendered(self, requests: Sequence[Request]) -> Sequence[Any]:
        # In one go where nothing is cut off, which vLLM's renderer does while it tokenises.
        if self._vllm.texts is not None and self._request.truncate_prompt_tokens is None:
            # If one cannot be tokenised, or rendered, none is: one by one, it is that row's fault alone.
            with suppress(Exception):
                prompts: list[Any] = [request.content for request in requests]
                ids = await asyncio.to_thread(self._vllm.texts.encode, prompts, self._request.add_special_tokens)
                rendered = await self._render(self._request.model_copy(update={self.field: ids}))
                if isinstance(rendered, list):
                    return rendered
        return await super()._rendered(requests)

    async def _render(self, request: Any) -> Any:
        return await self._serving.render_completion_request(request)


class Chat(Generation):
    """Messages that the model answers."""

    field = "messages"
    _part = "_oai_serving_chat"
    _type = ChatCompletionRequest
    _example: ClassVar[Any] = [{"role": "user", "content": "."}]

    def __init__(self, vllm: Vllm, fields: dict[str, Any], keep: Sequence[str]) -> None:
        # What a reasoning or tool parser changes in a request and takes from its answer is vLLM's own affair.
        self._parser = vllm.serving(self._part, self.field).parser_cls
        for name, part, options in (
            ("reasoning", "reasoning_parser_cls", "'reasoning_parser': …"),
            ("tool_calls", "tool_parser_cls", "'tool_call_parser': …, 'enable_auto_tool_choice': True"),
        ):
            if name in keep and getattr(self._parser, part, None) is None:
                raise ValueError(
                    f"keep={name!r}: the engine has no parser for it; deploy it with engine_kwargs={{{options}}}."
                )
        if self._parser is not None and {"token_ids", "prompt_token_ids"} & set(keep):
            fields = {**fields, "return_token_ids": True}
        super().__init__(vllm, fields, keep)

    async def _answer(self, request_id: str, content: Content, timeout: float | None, enter: Enter) -> Outcome:
        if self._parser is None:
            return await super()._answer(request_id, content, timeout, enter)
        # vLLM's chats have ids of their own form.
        async with enter(), self._vllm.stalls.bounded(f"chatcmpl-{request_id}", timeout):
            response = await anext(self._vllm.engine.chat(self._of(request_id, content), None))
        if hasattr(response, "error"):
            return refusal_of(response.error)
        return answers.of_chat(response, self._keep)

    async def _render(self, request: Any) -> Any:
        rendered = await self._serving.render_chat_request(request)
        # The conversation, and what the engine takes.
        return rendered[1] if isinstance(rendered, tuple) else rendered
