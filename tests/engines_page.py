"""The Engines page with clusters that are not there: for tests of its answers, and for those with a browser."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import uvicorn
from airflow.api_fastapi.app import get_auth_manager, init_auth_manager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.api_fastapi.auth.middlewares.refresh_token import JWTRefreshMiddleware
from fastapi import FastAPI

from airflow_provider_raylm.inventory import reference
from airflow_provider_raylm.plugins import api
from airflow_provider_raylm.plugins.raylm import URL_PREFIX
from airflow_provider_raylm.polling import JobInfo, Unreachable
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.specs import EngineSpec, Labels, Progress
from airflow_provider_raylm.testing import FakeRayJobs
from airflow_provider_raylm.wire import progress_line

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e' \" &"


class Cluster(FakeRayJobs):
    """A fake cluster that counts what is asked, and may be silent, slow or refuse."""

    def __init__(self, error=None):
        super().__init__()
        self.error = error
        self.slow = None
        self.asked = {"engines": 0, "jobs": 0, "logs": 0}

    def all_engines(self):
        self.asked["engines"] += 1
        if self.slow is not None:
            self.slow.wait(20)
        if self.error is not None:
            raise self.error
        return super().all_engines()

    def all_jobs(self):
        self.asked["jobs"] += 1
        return super().all_jobs()

    def logs(self, submission_id, lines=None):
        self.asked["logs"] += 1
        return super().logs(submission_id, lines)

    def deploy(self, engine="reviewer", dag_id="d", run_id="r", installation="tests", **spec):
        """Bring an engine up and return its reference."""
        labels = Labels(installation=installation, dag_id=dag_id, run_id=run_id, engine=engine)
        asked = EngineSpec(**{"name": "e", "model": "m", **spec})
        payload = {"engine": asked.model_dump(mode="json"), "labels": labels.model_dump(), "replace": False}
        ref = reference(asked, labels, 0.0)
        metadata = {"dag_id": dag_id, "run_id": run_id, "task_id": "deploy", "application": ref.application}
        self.submit(JobRequest(f"raylm-deploy-{ref.application}-1", "deploy", payload, metadata))
        return next(one for one in self.running_engines() if one.application == ref.application)

    def work(self, ref, task_id="label", records=(), status="RUNNING", **told):
        """Have a task work on an engine and tell its progress; return the job's id."""
        name = f"raylm-infer-{ref.application}-{len(self._jobs)}"
        metadata = {"dag_id": ref.labels.dag_id, "run_id": ref.labels.run_id, "task_id": task_id, "map_index": "-1"}
        job = JobInfo(status, "", {**metadata, "application": ref.application, **told}, time.time() - 100)
        self._jobs[name] = (job, "".join(f"{progress_line(None, one)}\nnoise\n" for one in records))
        return name

    def say(self, name, record):
        """Have a job tell its progress."""
        job, log = self._jobs[name]
        self._jobs[name] = (job, f"{log}{progress_line(None, record)}\n")

    def finish(self, name):
        """End a job."""
        job, log = self._jobs[name]
        self._jobs[name] = (replace(job, status="SUCCEEDED"), log)


def silent():
    """Return a cluster that does not answer."""
    return Cluster(Unreachable("http://ray-9:8265 does not answer (ConnectTimeout)."))


def record(at, rows, total=100, **more):
    """Return a progress record."""
    return Progress(
        at=at, seconds=at if at < 10_000 else 100, rows=rows, total=total, completion_tokens=4 * rows, **more
    )


def page(monkeypatch, clusters):
    """Return an application as the API server's, with the page, whose connections lead to *clusters*, by id."""
    monkeypatch.setattr(api, "connect", lambda connection: clusters[connection.conn_id])
    for conn_id in clusters:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", "raylm://:s3cr3t-t0ken@ray-head:8265")
    app = FastAPI()
    init_auth_manager(app)
    app.mount(URL_PREFIX, api.make_app())
    app.add_middleware(JWTRefreshMiddleware)
    return app


def token(role="admin", username="somebody"):
    """Return the token of somebody who has logged in."""
    return get_auth_manager().generate_jwt(SimpleAuthManagerUser(username=username, role=role))


@contextmanager
def served(app, port):
    """Serve an application on loopback while the body runs, and yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
