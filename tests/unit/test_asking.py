"""The way to the engine: calls that fail, hang, or are refused, and equal requests that are asked once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from airflow_provider_raylm import __version__
from airflow_provider_raylm.cluster.batch import asking
from airflow_provider_raylm.cluster.batch.asking import Calls, meet, once, through_handle
from airflow_provider_raylm.cluster.batch.recovery import EngineFailure
from airflow_provider_raylm.cluster.batch.rows import Answer, Refusal
from airflow_provider_raylm.errors import BatchError, EngineError

HOLD = Calls(lambda: None)


class Handle:
    """A deployment handle whose replica returns, or raises, what it is told."""

    def __init__(self, outcome):
        self.run_block = self.about = self
        self.outcome = outcome
        self.cancelled = False

    def remote(self, *_):
        return self

    def result(self, timeout_s):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.cancelled = True


def test_a_lost_answer_is_noticed():
    """Never a row without its answer."""
    with pytest.raises(EngineError, match="1 of 2 rows"):
        through_handle(Handle([Answer("a", "stop", 1, 1)]), 1, HOLD)("{}", ["a", "b"], alone=False)


def test_a_replica_that_does_not_answer_is_not_waited_for():
    """The rows' own time and a minute; then the call is taken back."""
    handle = Handle(TimeoutError())
    with pytest.raises(EngineFailure, match="did not answer within 65 s"):
        through_handle(handle, 5, HOLD)("{}", ["a"], alone=False)

    assert handle.cancelled


class NobodysHandle:
    """A deployment handle as Serve has it when the deployment is gone: a call waits until it is cancelled."""

    def __init__(self):
        self.run_block = self.run_block_alone = self
        self.cancelled = threading.Event()

    def options(self, stream):
        return self

    def remote(self, fields, contents, timeout, caller):
        return self

    def result(self, timeout_s=10):
        assert self.cancelled.wait(timeout_s)
        raise RequestCancelledError("id")

    def __next__(self):
        return self.result()

    def cancel(self):
        self.cancelled.set()


@pytest.mark.parametrize("alone", [False, True])
def test_a_call_ends_when_the_engine_is_gone(alone, monkeypatch):
    """And not before; a Serve that does not answer is not an engine that is gone."""
    states = [None, RayServeException("restarting"), EngineError("gone")]

    def require_there():
        state = states.pop(0) if len(states) > 1 else states[0]
        if state:
            raise state

    monkeypatch.setattr(asking, "LOOK_PERIOD_S", 0.05)
    with pytest.raises(EngineFailure, match="cancelled"):
        through_handle(NobodysHandle(), 10, Calls(require_there))("{}", ["a"], alone=alone)
    assert len(states) == 1


def test_equal_requests_are_asked_once():
    """Within a block, over blocks, and while another thread still waits for the answer."""
    asked = []
    started, may_end = threading.Event(), threading.Event()

    def slow(fields, contents):
        asked.append(list(contents))
        started.set()
        assert may_end.wait(10)
        return [Answer(content.upper(), "stop", 1, 1) for content in contents]

    ask_once = once(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask_once, "f", ["a", "b", "a"])
        assert started.wait(10)
        second = pool.submit(ask_once, "f", ["b"])
        may_end.set()
        assert [answer.text for answer in first.result(10)] == ["A", "B", "A"]
        assert [answer.text for answer in second.result(10)] == ["B"]

    assert asked == [["a", "b"]]
    ask_once("other fields", ["a"])
    assert asked[1:] == [["a"]]


def test_a_time_out_is_not_remembered():
    """The next equal row is asked again: it was not the question's fault."""
    outcomes = [Refusal("timeout", "late"), Answer("A", "stop", 1, 1)]
    ask_once = once(lambda fields, contents: [outcomes.pop(0)])

    assert ask_once("f", ["a"])[0] == Refusal("timeout", "late")
    assert ask_once("f", ["a"])[0].text == "A"
    assert ask_once("f", ["a"])[0].text == "A"


def test_answers_are_not_remembered_for_ever():
    """The oldest go first."""
    asked = []

    def count(fields, contents):
        asked.extend(contents)
        return [Answer(content, "stop", 1, 1) for content in contents]

    ask_once = once(count, keep=2)
    for content in ("a", "b", "c", "a", "c"):
        ask_once("f", [content])

    assert asked == ["a", "b", "c", "a"]


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
def test_an_engine_of_another_version_is_no_sick_one(cause):
    """It does not get better by waiting: the task fails at once and names the versions."""
    for call in (
        lambda handle: through_handle(handle, 1, HOLD)("{}", ["a"], alone=False),
        lambda handle: meet(handle, lambda: None),
    ):
        with pytest.raises(EngineError, match=rf"deployed by another version.*this task runs {__version__}.*clear"):
            call(Handle(raised(cause)))
    with pytest.raises(EngineError, match=rf"deployed by 0\.0\.7 of .*this task runs {__version__}"):
        meet(Handle({"version": "0.0.7", "capacity": 5}), lambda: None)
    assert meet(Handle({"version": __version__, "capacity": 5}), lambda: None) == 5


def test_what_the_engine_refuses_of_all_rows_is_no_failure_of_it():
    """The spec is wrong, and nothing else."""
    with pytest.raises(BatchError, match="^refuses logprobs$"):
        through_handle(Handle(raised(BatchError("refuses logprobs"))), 1, HOLD)("{}", ["a"], alone=False)
    with pytest.raises(EngineFailure, match="it died"):
        through_handle(Handle(raised(EngineError("it died"))), 1, HOLD)("{}", ["a"], alone=False)
