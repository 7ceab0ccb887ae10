"""What tasks that wait in the triggerer cost it and the dashboard: a real Airflow, and jobs that do not end."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import psutil

from airflow_provider_raylm import local
from tests.benchmarks.harness import cpu_s
from tests.standalone import Airflow, standalone

HERE = Path(__file__).parent
MEASURED_S = 60.0
SETTLE_S = 60.0
DEFER_TIMEOUT_S = 600.0


class _Dashboard(http.server.ThreadingHTTPServer):
    """Answers as Ray's dashboard does, and counts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Jobs)
        self.requests = 0
        self.jobs: set[str] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Airflow's end cuts its connections.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Jobs(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Dashboard

    def do_GET(self) -> None:
        self.server.requests += 1
        name = self.path.split("/")[3] if self.path.startswith("/api/jobs/") else ""
        if self.path.endswith("/logs"):
            self._answer(200, {"logs": ""})
        elif self.path.startswith("/api/v0/logs/"):
            self._answer(200, "", "text/plain")
        elif name in self.server.jobs:
            self._answer(200, {"status": "RUNNING", "message": ""})
        else:
            self._answer(404, f"Job {name} does not exist")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        self.server.jobs.add(body.get("submission_id", ""))
        self._answer(200, {"submission_id": body.get("submission_id"), "stopped": True})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, "")

    def _answer(self, code: int, body: dict[str, Any] | str, kind: str = "application/json") -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _dashboard() -> Iterator[_Dashboard]:
    with _Dashboard() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def deferred(tasks: tuple[int, ...]) -> dict[str, Any]:
    """Do as ``deferred_on`` with an Airflow that has nothing else to do."""
    environ = {"AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "1000"}
    with TemporaryDirectory(prefix="raylm-") as folder, standalone(Path(folder), [HERE / "dags"], environ) as airflow:
        return deferred_on(airflow, tasks)


def deferred_on(airflow: Airflow, tasks: tuple[int, ...]) -> dict[str, Any]:
    """Defer ever more tasks on one triggerer; measure its CPU and memory, and the dashboard's requests, over a minute.

    Args:
        airflow: has the DAGs of this folder.
        tasks: how many at a time, ascending.
    """
    found = {}
    with _dashboard() as dashboard:
        airflow.connect("raylm_deferred", conn_type="raylm", host="127.0.0.1", port=dashboard.server_port)
        runs, there = [], 0
        for number in tasks:
            runs.append(airflow.trigger("raylm_deferred", {"tasks": number - there}))
            _wait_until_deferred(airflow, dashboard, runs[-1], number - there)
            there = number
            found[f"tasks_{number}"] = _measure(airflow, dashboard)
            print(f"bench: deferred {number} {found[f'tasks_{number}']}", flush=True)
        for run in runs:
            airflow.call("PATCH", f"/dags/raylm_deferred/dagRuns/{quote(run)}", state="failed")
    least, most = found[f"tasks_{tasks[0]}"], found[f"tasks_{tasks[-1]}"]
    ratios = {name: round(most[name] / least[name], 3) for name in least if least[name]}
    return {"contenders": found, "ratios": ratios}


def _wait_until_deferred(airflow: Airflow, dashboard: _Dashboard, run: str, tasks: int) -> None:
    end = time.monotonic() + DEFER_TIMEOUT_S
    path = f"/dags/raylm_deferred/dagRuns/{quote(run)}/taskInstances?state=deferred&limit=1"
    while airflow.call("GET", path)["total_entries"] < tasks:
        if time.monotonic() >= end:
            raise TimeoutError(f"{tasks} tasks are not deferred after {DEFER_TIMEOUT_S:g} s")
        time.sleep(2)
    # Until the triggerer has taken them over, and its look at each has its place in the order.
    before = dashboard.requests
    while dashboard.requests < before + tasks:
        if time.monotonic() >= end:
            raise TimeoutError(f"the triggerer has not looked at {tasks} jobs after {DEFER_TIMEOUT_S:g} s")
        time.sleep(0.5)
    time.sleep(SETTLE_S)


def _measure(airflow: Airflow, dashboard: _Dashboard) -> dict[str, float]:
    processes = [psutil.Process(pid) for pid in local.session(airflow.pid)]
    triggerer = [process for process in processes if "triggerer" in " ".join(process.cmdline())]
    requests, cpu = dashboard.requests, cpu_s(triggerer)
    time.sleep(MEASURED_S)
    return {
        "requests_per_s": round((dashboard.requests - requests) / MEASURED_S, 2),
        "triggerer_cpu_percent": round(100 * (cpu_s(triggerer) - cpu) / MEASURED_S, 1),
        "triggerer_rss_mb": round(sum(process.memory_info().rss for process in triggerer) / 2**20, 1),
    }
