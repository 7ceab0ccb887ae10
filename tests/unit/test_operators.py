"""What a task does with its job when it is told to end."""

from types import SimpleNamespace

import pytest

from airflow_provider_raylm.following import Stopped
from airflow_provider_raylm.operators.raylm import TeardownEngineOperator
from airflow_provider_raylm.polling import STOPPED, JobInfo
from airflow_provider_raylm.testing import FakeRayJobs


class KilledWhileItSubmits(FakeRayJobs):
    """A cluster on which jobs run until they are stopped; the task's user changes his mind while one is submitted."""

    def __init__(self, task):
        super().__init__()
        self.task = task
        self.stopped = []

    def submit(self, request):
        self.task.on_kill()
        return super().submit(request)

    def get(self, submission_id):
        job = super().get(submission_id)
        return job and JobInfo(STOPPED if submission_id in self.stopped else "RUNNING")

    def stop(self, submission_id):
        self.stopped.append(submission_id)


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_task_that_is_killed_while_it_submits_stops_the_job(deferrable):
    """There is no job to stop yet when it is told to end; it neither waits for the job nor defers then."""
    task = TeardownEngineOperator(task_id="teardown", engine="e", deferrable=deferrable)
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="teardown", map_index=-1, xcom_push=lambda key, value: None)
    jobs = KilledWhileItSubmits(task)

    with jobs.installed(), pytest.raises(Stopped, match="told to end"):
        task.execute({"ti": ti, "dag_run": SimpleNamespace(clear_number=0)})
    assert jobs.stopped == [request.submission_id for request in jobs.submitted]
