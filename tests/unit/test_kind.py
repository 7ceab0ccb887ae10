"""What a new kind of question takes: a field, a class that reads rows, a class that asks vLLM, and nothing between."""

import asyncio
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pyarrow as pa

from airflow_provider_raylm.cluster.batch import rows
from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request
from airflow_provider_raylm.cluster.batch.fragments import ROW_ID
from airflow_provider_raylm.cluster.batch.repeats import once
from airflow_provider_raylm.cluster.batch.rows import EngineTraits
from airflow_provider_raylm.cluster.batch.stage import BlockAnswerer
from airflow_provider_raylm.cluster.replica import questions
from airflow_provider_raylm.cluster.replica.questions import Questions
from airflow_provider_raylm.specs import Step


class CountStep(Step):
    """The author's side: a template of what is counted."""

    kinds: ClassVar = (*Step.kinds, "count")
    count: str | None = None

    @property
    def templates(self):
        yield self.count


class Counted:
    """The task's side: what is a row's own, and the column that its answer becomes."""

    columns = (pa.field("letters", pa.int64()),)
    reasks = 0
    at_a_time = 1

    def __init__(self, step, engine):
        self.render = rows.templates.compile_template(step.count)
        self.question = json.dumps({"kind": "counted", "fields": {"model": engine.model}, "keep": []})

    def request(self, row):
        return Request(self.render(row))

    def read(self, answer):
        return {"letters": answer.value}


class Counts:
    """The replica's side: what each row has to do once it may enter the engine."""

    def __init__(self, vllm, fields, keep):
        assert (fields, keep) == ({"model": "m"}, [])
        self.vllm = vllm

    async def rows(self, requests, timeout):
        async def row(request, enter):
            async with enter():
                if not request.content:
                    return await self.vllm.refusal(ValueError("nothing to count"))
                return Answer(len(request.content), "stop", len(request.content), 0)

        return [lambda enter, request=request: row(request, enter) for request in requests]


def an_engine():
    """Return an engine that is none, as Ray has it, as far as a question looks at one that asks for no more."""
    client = SimpleNamespace(tokenizer=None, vllm_config=None)
    return SimpleNamespace(_engine_client=client, _oai_models=SimpleNamespace(lora_requests={}))


def test_a_kind_of_its_own(monkeypatch):
    """A kind is a field of the step, and a class here and in the replica; nothing between them knows it."""
    monkeypatch.setitem(rows.KINDS, "count", Counted)
    monkeypatch.setitem(questions.KINDS, "counted", Counts)
    replica = Questions(an_engine(), ping=None, tasks=["generate"], fit=lambda working, waiting: None)

    async def ask(question, requests, near):
        return [await row(nullcontext) for row in await replica.rows(question, requests, None)]

    spec = SimpleNamespace(all_steps=(CountStep(count="${a}!"),), columns=None, preprocess=None, postprocess=None)
    table = pa.table({"a": ["x", "yyy", None, "x"], ROW_ID: list("0123")})
    came = asyncio.run(BlockAnswerer(spec, EngineTraits("m"), once(ask)).answer(table, "block"))

    assert came.rows.select(["a", "letters", "raylm_prompt_tokens"]).to_pylist() == [
        {"a": "x", "letters": 2, "raylm_prompt_tokens": 2},
        {"a": "yyy", "letters": 4, "raylm_prompt_tokens": 4},
        {"a": "x", "letters": 2, "raylm_prompt_tokens": 2},
    ]
    assert came.failed["raylm_reason"].to_pylist() == ["null_value"]
    (refused,) = asyncio.run(
        ask(json.dumps({"kind": "counted", "fields": {"model": "m"}, "keep": []}), [Request("")], None)
    )
    assert refused == Refusal("invalid_request", "nothing to count")
