"""The way to the engine: calls that fail, hang, or are refused, and equal requests that are asked once."""

import asyncio
import datetime

import numpy as np
import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch import asking
from airflow_provider_raylm.cluster.batch.asking import Engine, Handle, once
from airflow_provider_raylm.cluster.batch.exchange import Answer, Part, Refusal, Request, packed, unpacked
from airflow_provider_raylm.cluster.batch.recovery import EngineFailure
from airflow_provider_raylm.cluster.engine import status
from airflow_provider_raylm.errors import BatchError, EngineError
from tests.scripted import REF

ABOUT = {"version": __version__, "replica": "a", "capacity": 5, "cache_tokens": 160, "tasks": ["/out"]}


class Response:
    """What a streaming call gives: parts, an error, or, after None, nothing for ever."""

    def __init__(self, outcomes):
        self.outcomes = list(outcomes)
        self.cancelled = False

    async def __anext__(self):
        if not self.outcomes:
            raise StopAsyncIteration
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            await asyncio.Event().wait()
        return outcome

    def cancel(self):
        self.cancelled = True


class Deployment:
    """A deployment handle as Serve has it, whose replicas give, or raise, what they are told."""

    def __init__(self, *outcomes, abouts=(ABOUT,)):
        self.run_block = self
        self.response = Response(outcomes)
        self.abouts = abouts

    def options(self, stream):
        return self

    def remote(self, *pieces, **request):
        self.request = {**request, "requests": unpacked(pieces)}
        return self.response

    def broadcast(self, method):
        return self

    def results(self, timeout_s, return_exceptions):
        return list(self.abouts)


@pytest.fixture(autouse=True)
def is_there(monkeypatch):
    """The engine is there, as far as Serve knows."""
    monkeypatch.setattr(status, "require_there", lambda ref: None)


def handle(*outcomes, **fields):
    return Handle(Deployment(*outcomes, **fields), REF, "/out", None)


async def ask(handle):
    return [part async for part in handle.ask("{}", [Request("a")], alone=False, near=None)]


def part(*outcomes, begun=True, replica="a"):
    return Part(replica, begun, [(number, Answer(text, "stop", 1, 1)) for number, text in enumerate(outcomes)])


async def test_a_block_comes_in_parts():
    """With all that the engine has to know."""
    deployment = Deployment(part(begun=False), part("A"))
    asked = Handle(deployment, REF, "/out", 5.0, "me").ask("{}", [Request("a")], alone=True, near="here")

    assert [one async for one in asked] == [[], part("A").outcomes]
    assert deployment.request == {
        "question": "{}",
        "requests": [Request("a")],
        "rows": 1,
        "alone": True,
        "near": "here",
        "task": "/out",
        "timeout": 5.0,
        "caller": "me",
    }
    assert not deployment.response.cancelled


@pytest.mark.parametrize(("characters", "pieces"), [(10, 1), (1_000, 3), (40_000, 1)])
def test_a_block_travels_in_the_call_if_it_can(characters, pieces):
    """In arguments that Ray does not put into its object store, of which a call cannot have any number."""
    requests = [Request(f"{i}: {'ü' * characters}", "{}") for i in range(128)]
    found = packed(requests)

    assert len(found) == pieces
    assert pieces == 1 or max(map(len, found)) < 100_000
    assert unpacked(found) == requests


@pytest.mark.parametrize(
    ("parts", "begun"), [([], False), ([part(begun=False)], False), ([part(begun=False), part("A")], True)]
)
async def test_a_replica_that_falls_silent_is_not_waited_for(parts, begun, monkeypatch):
    """The call is taken back; who had not begun is not blamed."""
    monkeypatch.setattr(asking, "SILENT_S", 0.05)
    one = handle(*parts, None)
    with pytest.raises(EngineFailure, match="silent for") as failure:
        await ask(one)

    assert failure.value.begun == begun
    assert one._handle.response.cancelled


async def test_calls_end_when_the_engine_is_gone(monkeypatch):
    """And not before; a Serve that does not answer is not an engine that is gone."""
    one = handle(None)
    states = [None, RayServeException("restarting"), EngineError("gone")]

    def require_there(ref):
        if state := states.pop(0):
            raise state

    monkeypatch.setattr(status, "require_there", require_there)
    call = asyncio.create_task(ask(one))
    await one.look()
    with pytest.raises(RayServeException):
        await one.look()
    await asyncio.sleep(0.01)
    assert not call.done()
    with pytest.raises(EngineError, match="^gone$"):
        await one.look()
    with pytest.raises(EngineFailure, match="the engine is gone"):
        await call


@pytest.mark.parametrize(
    ("looks", "begun"),
    [
        (["a"], True),
        (["ab", "b"], False),
        # It has come since: what kills one replica after the other soon after its start would never be found.
        (["b"], True),
        (["b", "ab"], True),
    ],
)
async def test_a_replica_that_was_stopped_in_good_order_accuses_nobody(looks, begun):
    """Serve takes it out of its list first; what it still answers then is a farewell."""
    one = handle(part("A"), EngineError("the engine has failed"))
    for listed in looks:
        one._handle.abouts = [{**ABOUT, "replica": replica} for replica in listed]
        await one.look()
    with pytest.raises(EngineFailure) as failure:
        async for _ in one.ask("{}", [Request("a"), Request("b")], alone=False, near=None):
            pass

    assert failure.value.begun == begun


async def test_an_engine_is_what_its_replicas_say():
    """Together; one that does not answer counts for nothing."""
    abouts = [ABOUT, RayServeException("it died"), {**ABOUT, "replica": "b", "cache_tokens": 80, "tasks": ["/other"]}]
    assert await handle(abouts=abouts).look() == Engine(
        replicas=frozenset("ab"), capacity=10, cache_tokens=80, tasks=frozenset({"/out", "/other"})
    )
    with pytest.raises(EngineError, match="it died"):
        await handle(abouts=abouts[1:2]).look()


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


def raised(cause):
    """What a caller gets of an error that a replica raised."""
    return RayTaskError("run_block", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "cause",
    [
        RayServeException("Tried to call a method 'run_block' that does not exist. Available methods: ['a']."),
        TypeError("run_block() takes 2 positional arguments but 3 were given"),
        AttributeError("no such thing"),
    ],
)
async def test_an_engine_of_another_version_is_no_sick_one(cause):
    """It does not get better by waiting: the task fails at once and names the versions."""
    for call in (ask(handle(raised(cause))), handle(abouts=[raised(cause)]).look()):
        with pytest.raises(EngineError, match=rf"deployed by another version.*this task runs {__version__}.*clear"):
            await call
    with pytest.raises(EngineError, match=rf"deployed by 0\.0\.7 of .*this task runs {__version__}"):
        await handle(abouts=[{"version": "0.0.7", "capacity": 5}]).look()


async def test_what_the_engine_refuses_of_all_rows_is_no_failure_of_it():
    """The spec is wrong, and nothing else."""
    with pytest.raises(BatchError, match="^refuses logprobs$"):
        await ask(handle(raised(BatchError("refuses logprobs"))))
    with pytest.raises(EngineFailure, match="it died"):
        await ask(handle(raised(EngineError("it died"))))
