"""A thread that keeps a promise outlives any exception, and does not repeat itself."""

import threading

import pytest

from airflow_provider_raylm.cluster.periodic import Periodic

PERIOD_S = 0.01


class Promise:
    """A function that fails as it is told, one entry of *outcomes* a call, and then succeeds."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.kept = threading.Event()

    def __call__(self):
        if self.outcomes:
            outcome = self.outcomes.pop(0)
            if outcome is not None:
                raise outcome
        else:
            self.kept.set()


def keep(act, say):
    """Call *act* until it has succeeded after all its failures."""
    one = Periodic("raylm-test", "keeping it", PERIOD_S, act, say)
    assert act.kept.wait(5), "the thread has ended"
    one.stop(5)


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_it_goes_on_whatever_is_raised(error):
    keep(Promise(error, error), lambda line: None)


def test_a_trouble_is_said_once():
    """When it begins, when it becomes another one, and when it is over."""
    said = []
    away = [RuntimeError(f"away {n}") for n in range(5)]
    keep(Promise(*away, TimeoutError("first line\nlast line"), None, RuntimeError("away")), said.append)

    assert said == [
        "keeping it fails, and is tried every 0.01 s: RuntimeError: away 0",
        "keeping it fails, and is tried every 0.01 s: TimeoutError: last line",
        "keeping it succeeds again",
        "keeping it fails, and is tried every 0.01 s: RuntimeError: away",
        "keeping it succeeds again",
    ]


def test_it_goes_on_when_nobody_listens():
    """Such as when the log is closed."""

    def say(line):
        raise BrokenPipeError

    keep(Promise(ValueError("bad")), say)


def test_a_stopped_one_calls_no_more():
    """And a call that hangs does not hold up who stops it."""
    calls, hung = [], threading.Event()

    def act():
        calls.append(1)
        hung.wait(5)

    one = Periodic("raylm-test", "keeping it", PERIOD_S, act, print)
    while not calls:
        threading.Event().wait(PERIOD_S)
    one.stop(0.05)
    hung.set()
    one.stop(5)
    assert calls == [1]
    assert "raylm-test" not in {thread.name for thread in threading.enumerate()}
