"""Equal requests that are asked once, and what is remembered of them."""

import asyncio
import datetime

import numpy as np

from airflow_provider_raylm.cluster.batch.exchange import Answer, Refusal, Request
from airflow_provider_raylm.cluster.batch.repeats import once
from airflow_provider_raylm.errors import EngineError


async def test_equal_requests_are_asked_once():
    """Within a block, over blocks, and while another block still waits for the answer."""
    asked = []
    may_end = asyncio.Event()

    async def slow(question, requests, near):
        asked.append(list(requests))
        await may_end.wait()
        return [Answer(content.upper(), "stop", 1, 1) for content in requests]

    ask_once = once(slow)
    first = asyncio.create_task(ask_once("f", ["a", "b", "a"]))
    second = asyncio.create_task(ask_once("f", ["b"]))
    await asyncio.sleep(0)
    may_end.set()
    assert [answer.value for answer in await first] == ["A", "B", "A"]
    assert [answer.value for answer in await second] == ["B"]

    assert asked == [["a", "b"]]
    await ask_once("other question", ["a"])
    assert asked[1:] == [["a"]]


async def test_an_error_reaches_all_who_wait():
    """And the next to ask begins anew."""
    outcomes = [EngineError("gone"), [Answer("A", "stop", 1, 1)]]

    async def ask(question, requests, near):
        await asyncio.sleep(0)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    ask_once = once(ask)
    ended = await asyncio.gather(*(ask_once("f", ["a"]) for _ in range(2)), return_exceptions=True)
    assert [str(error) for error in ended] == ["gone"] * 2
    assert (await ask_once("f", ["a"]))[0].value == "A"


async def test_a_time_out_is_not_remembered():
    """The next equal row is asked again: it was not the question's fault."""
    outcomes = [Refusal("timeout", "late"), Answer("A", "stop", 1, 1)]

    async def ask(question, requests, near):
        return [outcomes.pop(0)]

    ask_once = once(ask)
    assert (await ask_once("f", ["a"]))[0] == Refusal("timeout", "late")
    assert (await ask_once("f", ["a"]))[0].value == "A"
    assert (await ask_once("f", ["a"]))[0].value == "A"


async def test_answers_are_not_remembered_for_ever():
    """The oldest go first; by their size, because an embedding is larger than a word."""
    asked = []

    async def count(question, requests, near):
        asked.extend(requests)
        return [Answer(np.zeros(len(content), np.float32), "", 1, 0) for content in requests]

    ask_once = once(count, keep=10_000)
    for content in ("a" * 1_000, "b", "c", "a" * 1_000, "d" * 1_500, "b", "a" * 1_000):
        await ask_once("f", [content])

    assert [content[0] for content in asked] == ["a", "b", "c", "d", "a"]


async def test_equal_rows_do_not_share_what_they_keep():
    """What a row function does to one is not done to the others, nor to rows to come."""

    async def keeps(question, requests, near):
        return [Answer("A", "stop", 1, 1, extra={"token_ids": [1]}) for _ in requests]

    ask_once = once(keeps)
    first, second = await ask_once("f", ["a", "a"])
    first.extra["token_ids"].append(2)

    assert second.extra["token_ids"] == [1]
    assert (await ask_once("f", ["a"]))[0].extra["token_ids"] == [1]


async def test_turns_that_are_no_json_are_compared_too():
    """A column of conversations may hold any value of Arrow's, for which one row may fail and not the task."""
    asked = []

    async def count(question, requests, near):
        asked.extend(requests)
        return [Refusal("invalid_request", "no JSON") for _ in requests]

    days = [datetime.date(2026, 1, day) for day in (1, 2, 1)]
    turns = [[{"role": "assistant", "content": "", "tool_calls": [{"arguments": {"day": day}}]}] for day in days]
    assert len(await once(count)("f", [Request(one) for one in turns])) == 3

    assert [one.content for one in asked] == turns[:2]
