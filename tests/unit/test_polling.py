"""One look at a job means the same to a waiting worker and to a trigger."""

import pytest

from airflow_provider_raylm import polling
from airflow_provider_raylm.polling import Ended, Expired, JobInfo, Lost, Unreachable, Wait, Watch, decide

RUNNING = JobInfo("RUNNING")
SILENCE = Unreachable("no answer")


def test_a_job_that_goes_on_is_waited_for():
    """Until its deadline."""
    watch = Watch(deadline=100)

    assert Wait(watch) == decide(watch, RUNNING, now=99)
    assert isinstance(decide(watch, RUNNING, now=100), Expired)


def test_an_ended_job_is_ended_even_past_the_deadline():
    """Its work is done: throwing it away would pay twice."""
    for status in ("SUCCEEDED", "FAILED", "STOPPED"):
        assert Ended(JobInfo(status)) == decide(Watch(deadline=1), JobInfo(status), now=2)


def test_silence_is_not_absence():
    """It is borne for a while, and the while begins anew after each answer."""
    silent = decide(Watch(outage_limit=10), SILENCE, now=5)

    assert Wait(Watch(outage_limit=10, silent_since=5)) == silent
    assert Wait(silent.watch) == decide(silent.watch, SILENCE, now=14.9)
    assert isinstance(decide(silent.watch, SILENCE, now=15), Lost)
    assert Wait(Watch(outage_limit=10)) == decide(silent.watch, RUNNING, now=14.9)


def test_a_job_that_ray_does_not_know_is_lost():
    """The reason says what to clear."""
    lost = decide(Watch(), None, now=0)

    assert isinstance(lost, Lost)
    assert "clear the deploy task" in lost.reason


def test_the_deadline_holds_during_silence():
    """A dead dashboard does not keep a task for longer than it may take."""
    assert isinstance(decide(Watch(deadline=3), SILENCE, now=3), Expired)


def waits(submitted_at, message="not yet"):
    return JobInfo("PENDING", message, submitted_at=submitted_at, started=False)


def test_a_job_that_waits_to_start_is_told_of():
    """Not of a quick one; then when the reason changes, now and then, and when it has started."""
    looks = [*(waits(100, "not yet"),) * 70, *(waits(100, "no room"),) * 3, *(RUNNING,) * 3]
    watch, told = Watch(), []
    for i, seen in enumerate(looks):
        decision = decide(watch, seen, now=100 + 2 * i)
        watch = decision.watch
        told += [decision.news] if decision.news else []

    assert told == [
        "waits to start, for 16 s so far: not yet",
        "waits to start, for 76 s so far: not yet",
        "waits to start, for 136 s so far: not yet",
        "waits to start, for 140 s so far: no room",
        "has started",
    ]
    assert watch == Watch()


def test_a_job_that_starts_at_once_is_not_told_of():
    looks = [decide(Watch(), waits(100), 101), decide(Watch(), RUNNING, 103), decide(Watch(), waits(100), 90)]

    assert [Wait(Watch())] * 3 == looks


def test_a_job_may_wait_to_start_for_so_long():
    """By default for longer than Ray lets it, whose own words say more; a job that runs may take its time."""
    watch = Watch(pending_timeout=60)
    assert isinstance(decide(watch, waits(100), now=159.9), Wait)
    expired = decide(watch, waits(100, "Not yet."), now=160)

    assert expired.reason.startswith(
        "has not started within pending_timeout (60 s); it was told to stop. Ray says: Not yet. Look at the head node"
    )
    assert isinstance(decide(watch, JobInfo("RUNNING", submitted_at=100), now=1e9), Wait)
    # Where it is not told since when.
    assert isinstance(decide(watch, JobInfo("PENDING", started=False), now=1e9), Wait)


def test_rays_own_bound_is_the_shorter():
    consts = pytest.importorskip("ray.dashboard.consts")

    assert consts.DEFAULT_JOB_START_TIMEOUT_SECONDS < polling.PENDING_TIMEOUT_S
    assert consts.RAY_JOB_START_TIMEOUT_SECONDS_ENV_VAR in decide(Watch(), waits(0), 1e9).reason
