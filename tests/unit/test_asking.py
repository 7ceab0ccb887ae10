"""The way to the engine: calls that fail, hang, or are refused."""

import asyncio

import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch import asking
from airflow_provider_raylm.cluster.batch.asking import Engine, Handle
from airflow_provider_raylm.cluster.batch.exchange import Answer, Part, Request, packed, unpacked
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
        if isinstance(outcome, BaseException):
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


async def test_a_call_that_the_replica_cancels_is_a_failure_of_the_engine():
    """Serve raises it as if the caller were cancelled, which would end the task without a word of why."""
    with pytest.raises(EngineFailure, match="the replica has cancelled the call"):
        await ask(handle(part("A"), asyncio.CancelledError()))


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


async def test_an_engine_that_does_not_say_what_it_is_is_asked_again(monkeypatch):
    """A task may begin while a replica dies or hangs; it waits for that as long as it waits for engines."""
    monkeypatch.setattr(asking, "PING_PERIOD_S", 0.001)
    answers = [TimeoutError("Timed out waiting for broadcast results."), [RayServeException("it died")], [], [ABOUT]]

    class Starting(Deployment):
        def results(self, timeout_s, return_exceptions):
            if isinstance(answer := answers.pop(0) if len(answers) > 1 else answers[0], Exception):
                raise answer
            return answer

        class ping:
            @staticmethod
            async def remote():
                pass

    one = Handle(Starting(), REF, "/out", None)
    assert (await one.arrive(60)).capacity == ABOUT["capacity"]

    answers[:] = [TimeoutError("Timed out waiting for broadcast results.")]
    with pytest.raises(EngineError, match=r"does not say what it is: Timed out"):
        await one.arrive(0)
    answers[:] = [[{"version": "0.0.7", "capacity": 5}]]
    with pytest.raises(EngineError, match=r"deployed by 0\.0\.7"):
        await one.arrive(60)


async def test_an_engine_is_what_its_replicas_say():
    """Together; one that does not answer counts for nothing."""
    abouts = [ABOUT, RayServeException("it died"), {**ABOUT, "replica": "b", "cache_tokens": 80, "tasks": ["/other"]}]
    assert await handle(abouts=abouts).look() == Engine(
        replicas=frozenset("ab"), capacity=10, cache_tokens=80, tasks=frozenset({"/out", "/other"})
    )
    with pytest.raises(EngineError, match="it died"):
        await handle(abouts=abouts[1:2]).look()


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
