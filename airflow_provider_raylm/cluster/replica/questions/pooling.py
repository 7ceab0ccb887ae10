"""Embeddings, classes and scores: what the model makes of a text in one pass.

Texts are rendered, and outputs are read, by the same parts of vLLM (its IO processors) as ``LLM.embed``,
``LLM.classify`` and ``LLM.score`` have; rows enter the engine one by one, as all do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar
from uuid import uuid4

from vllm import PoolingParams
from vllm.entrypoints.pooling.typing import (
    OfflineEncodeInputsContext,
    OfflineOutputsContext,
    OfflineScoringInputsContext,
)
from vllm.outputs import PoolingOutput
from vllm.tasks import SCORE_TYPE_MAP

from airflow_provider_raylm.cluster.batch.exchange import Answer, Outcome, Request
from airflow_provider_raylm.cluster.replica.admission import Enter
from airflow_provider_raylm.cluster.replica.questions.vllm import Vllm
from airflow_provider_raylm.cluster.replica.serving import Row
from airflow_provider_raylm.specs import Step


class Pooling:
    """What the rows of a block share."""

    name: ClassVar[str]

    def __init__(self, vllm: Vllm, fields: dict[str, Any], keep: Sequence[str]) -> None:
        self._vllm = vllm
        self._task, self._processor = self._of(vllm)
        # What vLLM's tokenizers heed, beside the fields of PoolingParams.
        self._tokenization = {name: fields[name] for name in Step.truncation_fields if name in fields}
        self._limit = self._tokenization.get("truncate_prompt_tokens")
        if self._limit is not None and self._limit > vllm.context:
            raise ValueError(f"truncate_prompt_tokens is {self._limit}, but the model reads {vllm.context} tokens.")
        chosen = {name: value for name, value in fields.items() if name not in Step.truncation_fields}
        known = PoolingParams().all_parameters
        if unknown := [name for name in chosen if name not in known]:
            has = ", ".join(known)
            raise ValueError(f"extra_body.{unknown[0]}: not a parameter of {self.name}; vLLM has {has}.")
        self._params = PoolingParams(task=self._task, **chosen)
        self._params.verify(vllm.client.vllm_config.model_config)

    def _of(self, vllm: Vllm) -> tuple[Any, Any]:
        """Return vLLM's name of the task, and its part for it.

        Raises:
            ValueError: the model is for another one.
        """
        return self.name, vllm.processor(self.name, self.name)

    async def rows(self, requests: Sequence[Request], timeout: float | None) -> list[Row]:
        """Return what each row has to do; all are rendered in one go, or if one cannot be, each by itself."""
        block = uuid4().hex
        rendered: Sequence[Any] = [None] * len(requests)
        with suppress(Exception):
            rendered = await asyncio.to_thread(self._rendered, requests, self._tokenization)
        return [
            partial(self._row, f"{block}-{i}", request, inputs, timeout)
            for i, (request, inputs) in enumerate(zip(requests, rendered, strict=True))
        ]

    def _rendered(self, requests: Sequence[Request], tokenization: Mapping[str, Any]) -> list[list[Any]]:
        """Return what the engine takes for each row, one input or more."""
        context = OfflineEncodeInputsContext(
            pooling_task=self._task,
            prompts=self._prompts([str(request.content) for request in requests], tokenization),
            pooling_params=self._params,
            tokenization_kwargs=dict(tokenization),
            lora_request=None,
            priorities=None,
        )
        factory, _ = self._processor.get_request_factory_offline(context)
        return [[self._processor.render(one)] for one in factory()]

    def _prompts(self, texts: list[str], tokenization: Mapping[str, Any]) -> list[Any]:
        """Return texts as vLLM takes them: as token ids, all made in one go, where it would do no more than that."""
        usual = self._processor.renderer.default_cmpl_tok_params
        if self._vllm.texts is None or tokenization or usual.do_lower_case:
            return texts
        return [{"prompt_token_ids": ids} for ids in self._vllm.texts.encode(texts, usual.add_special_tokens)]

    async def _row(
        self, request_id: str, request: Request, inputs: list[Any] | None, timeout: float | None, enter: Enter
    ) -> Outcome:
        try:
            if inputs is None:
                (inputs,) = await asyncio.to_thread(self._rendered, [request], self._tokenization)
            async with enter(), self._vllm.stalls.bounded(request_id, timeout):
                outputs = [await self._encode(f"{request_id}-{i}", one) for i, one in enumerate(inputs)]
            (output,) = self._processor.post_process_offline(OfflineOutputsContext(outputs=outputs, n_queries=1))
        except Exception as error:
            return await self._vllm.refusal(error)
        # The score of two embeddings is a tensor, not an output that holds one.
        data = output.outputs.data if isinstance(output.outputs, PoolingOutput) else output.outputs
        tokens = [len(one.prompt_token_ids) for one in outputs]
        return Answer(self._value(data), "", sum(tokens), 0, truncated=await self._is_longer(request, tokens))

    async def _is_longer(self, request: Request, tokens: Sequence[int]) -> bool:
        """Return whether a text was cut, which vLLM does not tell: whether it is longer without the limit."""
        if self._limit is None or max(tokens) < (self._limit if self._limit > 0 else self._vllm.context):
            return False
        try:
            (whole,) = await asyncio.to_thread(self._rendered, [request], {})
        except Exception:
            # What can be rendered with the limit, and cannot be without, is too long.
            return True
        return sum(len(one["prompts"]["prompt_token_ids"]) for one in whole) > sum(tokens)

    async def _encode(self, request_id: str, inputs: Any) -> Any:
        stream = self._vllm.client.encode(inputs["prompts"], inputs["params"], request_id)
        (output,) = [one async for one in stream]
        return output

    def _value(self, data: Any) -> Any:
        """Return the model's output as the answer has it."""
        raise NotImplementedError


class Embed(Pooling):
    """A vector."""

    name = "embed"

    def _value(self, data: Any) -> Any:
        return data.float().numpy()


class Classify(Pooling):
    """The probability of each class, by its name in the model's configuration."""

    name = "classify"

    def _value(self, data: Any) -> list[tuple[str, float]]:
        labels = self._vllm.client.vllm_config.model_config.hf_config.id2label or {}
        return [(labels.get(i, str(i)), probability) for i, probability in enumerate(data.float().tolist())]


class Score(Pooling):
    """How well two texts fit, by a reranker (cross-encoder) or by two embeddings."""

    name = "score"

    def _of(self, vllm: Vllm) -> tuple[Any, Any]:
        processor = vllm.processor(SCORE_TYPE_MAP.get(vllm.pooling_task), self.name)
        return processor.pooling_task, processor

    def _rendered(self, requests: Sequence[Request], tokenization: Mapping[str, Any]) -> list[list[Any]]:
        return [self._pair(str(request.content), dict(tokenization)) for request in requests]

    def _pair(self, content: str, tokenization: dict[str, Any]) -> list[Any]:
        query, document = json.loads(content)
        context = OfflineScoringInputsContext(
            pooling_task=self._task,
            scoring_data=self._processor.valid_inputs(query, document),
            chat_template=None,
            pooling_params=self._params,
            tokenization_kwargs=tokenization,
            lora_request=None,
            priorities=None,
        )
        factory, _ = self._processor.get_request_factory_offline(context)
        return [self._processor.render(one) for one in factory()]

    def _value(self, data: Any) -> float:
        return float(data.float().item())
