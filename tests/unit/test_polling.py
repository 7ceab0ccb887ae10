"""One look at a job means the same to a waiting worker and to a trigger."""

from airflow_provider_raylm.polling import Ended, Expired, JobInfo, Lost, Unreachable, Wait, Watch, decide

RUNNING = JobInfo("RUNNING")
SILENCE = Unreachable("no answer")


def test_a_job_that_goes_on_is_waited_for():
    """Until its deadline."""
    watch = Watch(deadline=100)

    assert Wait(watch) == decide(watch, RUNNING, now=99)
    assert Expired() == decide(watch, RUNNING, now=100)
    assert Wait(Watch()) == decide(Watch(), JobInfo("PENDING"), now=1e9)


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
    assert "Clear the deploy task" in lost.reason


def test_the_deadline_holds_during_silence():
    """A dead dashboard does not keep a task for longer than it may take."""
    assert Expired() == decide(Watch(deadline=3), SILENCE, now=3)
