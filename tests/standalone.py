"""A real Airflow for tests and the demo: `airflow standalone` on loopback, driven over its REST API."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

START_TIMEOUT_S = 180.0
PORT = 28080
DONE = {"success", "failed"}


class Airflow:
    """The REST API of a running standalone.

    Attributes:
        pid: the process that began the session of all its processes.
        environ: what its processes have as their environment.
        url: its address.
    """

    def __init__(self, url: str, pid: int, environ: Mapping[str, str], login: tuple[str, str] | None = None) -> None:
        self.pid = pid
        self.environ = environ
        self.url = url
        if login is None:
            answer = httpx.get(f"{url}/auth/token", timeout=30)
        else:
            body = {"username": login[0], "password": login[1]}
            answer = httpx.post(f"{url}/auth/token", json=body, timeout=30)
        token = answer.raise_for_status().json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=f"{url}/api/v2", headers=headers, timeout=60)

    def call(self, method: str, path: str, **body: Any) -> Any:
        """Send one request and return its JSON."""
        response = self._http.request(method, path, **({"json": body} if body else {}))
        if not response.is_success:
            raise RuntimeError(f"{method} {path}: {response.status_code} {response.text[:500]}")
        return response.json() if response.content else None

    def trigger(self, dag_id: str, conf: Mapping[str, Any]) -> str:
        """Unpause the DAG, start a run, and return its id; waits until the DAG has been parsed."""
        end = time.monotonic() + 120
        while True:
            try:
                self.call("PATCH", f"/dags/{dag_id}", is_paused=False)
                break
            except RuntimeError:
                if time.monotonic() >= end:
                    raise
                time.sleep(1)
        return str(self.call("POST", f"/dags/{dag_id}/dagRuns", logical_date=None, conf=dict(conf))["dag_run_id"])

    def wait(self, dag_id: str, run_id: str, timeout: float) -> str:
        """Wait until the run has ended and return its state."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            state = str(self.call("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}")["state"])
            if state in DONE:
                return state
            time.sleep(1)
        raise TimeoutError(f"{dag_id} {run_id} is not done after {timeout:.0f} s: {self.states(dag_id, run_id)}")

    def instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return the run's task instances."""
        found = self.call("GET", f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances")["task_instances"]
        return list(found)

    def states(self, dag_id: str, run_id: str) -> dict[str, str]:
        """Return each task's state."""
        return {ti["task_id"]: ti["state"] for ti in self.instances(dag_id, run_id)}

    def connect(self, connection_id: str, **fields: Any) -> None:
        """Make a connection, or change the one that has the name."""
        entity = {"connection_id": connection_id, **fields}
        action = {"action": "create", "entities": [entity], "action_on_existence": "overwrite"}
        self.call("PATCH", "/connections", actions=[action])

    def mark(self, dag_id: str, run_id: str, task_id: str, state: str) -> None:
        """Give a task a state, as its user does."""
        self.call("PATCH", f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}", new_state=state)

    def clear(self, dag_id: str, run_id: str, task_id: str) -> None:
        """Let a task run again."""
        self.call(
            "POST",
            f"/dags/{dag_id}/clearTaskInstances",
            dag_run_id=run_id,
            task_ids=[task_id],
            dry_run=False,
            only_failed=False,
        )

    def xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """Return what a task returned."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/xcomEntries/return_value"
        value = self.call("GET", path)["value"]
        return json.loads(value) if isinstance(value, str) else value

    def links(self, dag_id: str, run_id: str, task_id: str) -> dict[str, str | None]:
        """Return where the buttons on a task's page lead."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/links"
        return dict(self.call("GET", path)["extra_links"])

    def log(self, dag_id: str, run_id: str, task_id: str, attempt: int = 1) -> str:
        """Return a task's log as text."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}/logs/{attempt}"
        lines = []
        for entry in self.call("GET", f"{path}?full_content=true")["content"]:
            if not isinstance(entry, dict):
                lines.append(str(entry))
                continue
            lines.append(str(entry.get("event", entry)))
            lines += [f"{error['exc_type']}: {error['exc_value']}" for error in entry.get("error_detail") or ()]
        return "\n".join(lines)


class Standing:
    """One Airflow for many tests: it starts when it is first asked for, and once more after it was killed.

    Args:
        folder: for its home.
        dags: folders of DAGs.
        environ: beside what every standalone has.
    """

    def __init__(self, folder: Path, dags: Sequence[Path], environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._dags = dags
        self._environ = environ
        self._airflow: Airflow | None = None
        self._leaders: list[int] = []
        self._stack = ExitStack()

    @property
    def airflow(self) -> Airflow:
        """The Airflow that runs."""
        if self._airflow is None:
            home = self._folder / f"airflow-{time.monotonic_ns()}"
            self._airflow = self._stack.enter_context(standalone(home, self._dags, self._environ))
            self._leaders = [self._airflow.pid]
        return self._airflow

    def start_triggerer(self) -> None:
        """Start one more triggerer, for as long as the Airflow runs."""
        from airflow_provider_raylm.local import end_session

        process = subprocess.Popen(
            [sys.executable, "-m", "airflow", "triggerer", "--skip-serve-logs"],
            env=self.airflow.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._leaders.append(process.pid)
        self._stack.callback(process.wait)
        self._stack.callback(end_session, process.pid)

    def kill(self) -> None:
        """Kill all its processes without a chance to clean up."""
        from airflow_provider_raylm.local import session

        for pid in [pid for leader in self._leaders for pid in session(leader)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """End it, if it runs."""
        self._airflow = None
        self._stack.close()


@contextmanager
def standalone(
    home: Path, dags: Sequence[Path], environ: Mapping[str, str], login: tuple[str, str] | None = None
) -> Iterator[Airflow]:
    """Start Airflow with a home and a database of its own, and end all its processes afterwards.

    Args:
        home: its folder.
        dags: folders of DAGs.
        environ: variables that it has beside what this process has and what a standalone needs.
        login: name and password of an admin, where not everybody is one.

    Raises:
        TimeoutError: it is not healthy after three minutes; the text has its last lines.
    """
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{PORT}"
    log = home / "standalone.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps([_bundle(folder) for folder in dags]),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__CORE__PARALLELISM": "8",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(PORT),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(PORT + 1),
        "AIRFLOW__TRIGGERER__TRIGGER_LOG_SERVER_PORT": str(PORT + 2),
        # On a machine that is busy with an engine a late scheduler is not a dead one, whose tasks would be reset.
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "300",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "3600",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        # No file changes; to read all of them every half minute takes a third of a core.
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
        **environ,
    }
    command = [sys.executable, "-m", "airflow", "standalone"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_healthy(url, process, log)
        yield Airflow(url, process.pid, environment, login)
    finally:
        _end_session(process)


def _bundle(folder: Path) -> dict[str, Any]:
    name = str(folder).strip("/").replace("/", "-")
    classpath = "airflow.dag_processing.bundles.local.LocalDagBundle"
    return {"name": name, "classpath": classpath, "kwargs": {"path": str(folder)}}


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            health = httpx.get(f"{url}/api/v2/monitor/health", timeout=5).json()
            if all(health[part]["status"] == "healthy" for part in ("metadatabase", "scheduler", "dag_processor")):
                return
        except (httpx.TransportError, ValueError, KeyError):
            pass
        if process.poll() is not None or time.monotonic() >= end:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise TimeoutError(f"Airflow did not come up:\n{tail}")
        time.sleep(0.5)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End everything that standalone started: its children live in its session and its process groups."""
    from airflow_provider_raylm.local import end_session

    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    end_session(process.pid)
