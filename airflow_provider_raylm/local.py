"""The embedded cluster behind ``raylm://local``: a Ray head on this machine, for laptops and tests.

It is started when none answers, stays up for the next task, listens on loopback only, and needs the ``ray`` extra. Ray
is run as a command, never imported.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx

from airflow_provider_raylm.errors import ClusterError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
HOST = "127.0.0.1"
_AGENT_HEALTH = "/api/local_raylet_healthz"


@dataclass(frozen=True)
class LocalCluster:
    """A Ray head that this module started.

    Attributes:
        pid: process that owns all of the cluster's processes; it ends them when it is told to stop.
        dashboard_url: address of the dashboard.
        log: file with what Ray printed.
    """

    pid: int
    dashboard_url: str
    log: str


def default_folder() -> Path:
    """Return the folder of this user's embedded cluster."""
    return Path(tempfile.gettempdir()) / f"raylm-{os.getuid()}"


def ensure_local_cluster(port: int) -> str:
    """Return the dashboard's address of the Ray head on this machine, after starting one if none answers.

    Raises:
        ClusterError: Ray is not installed, or did not come up; the text has its last words.
    """
    url = f"http://{HOST}:{port}"
    with _locked(default_folder()):
        if not _answers(f"{url}/api/version"):
            start(default_folder(), port)
    return url


def is_up(port: int) -> bool:
    """Return whether a Ray head answers on this machine."""
    return _answers(f"http://{HOST}:{port}/api/version")


def find_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the token of the local cluster, from where Ray itself looks, or None.

    The order is Ray's: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, ``~/.ray/auth_token``.
    """
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"]
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() or None if path.is_file() else None


def start(
    folder: Path, port: int, *, cpus: float | None = None, environ: Mapping[str, str] | None = None
) -> LocalCluster:
    """Start a Ray head and wait until its dashboard answers.

    Args:
        folder: holds the log, the note for ``stop``, and Ray's session. Ray makes sockets below it, whose paths Linux
            limits to 107 bytes: keep it short.
        port: of the dashboard; not within Ray's worker ports, 10002 to 19999.
        cpus: logical CPUs; default: the machine's.
        environ: the head's environment; default: this process's.

    Raises:
        ClusterError: Ray is not installed, or did not come up within three minutes.
    """
    if find_spec("ray") is None:
        raise ClusterError("raylm://local needs Ray on this machine: pip install 'airflow-provider-raylm[cpu]'")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ray-head.log"
    environment = dict(os.environ if environ is None else environ)
    # Jobs start `python`: it has to be the interpreter that has Ray.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray takes 127.0.0.1 for the machine's outer address, and listens on all, unless it is told that there is no
    # cluster beyond this machine. The name is of systems on which that is the default.
    environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    agent, client = _free_ports(2)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={HOST}", "--port=0", f"--temp-dir={folder}"),
        *(f"--dashboard-host={HOST}", f"--dashboard-port={port}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        # It reads all logs ten times a second, for drivers that print what their workers do. This package's jobs do not
        # print it, and the dashboard reads the files.
        "--include-log-monitor=False",
        *([f"--num-cpus={cpus:g}"] if cpus is not None else []),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    leave_room_for_others(process.pid)
    cluster = LocalCluster(process.pid, f"http://{HOST}:{port}", str(log))
    _note(folder).write_text(json.dumps(asdict(cluster)))
    end = time.monotonic() + START_TIMEOUT_S
    # The dashboard answers before the agent does that starts its jobs.
    while not (_answers(f"{cluster.dashboard_url}/api/version") and _answers(f"http://{HOST}:{agent}{_AGENT_HEALTH}")):
        if process.poll() is not None or time.monotonic() >= end:
            stop(folder)
            words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ClusterError(f"Ray did not come up at {cluster.dashboard_url}. Its last words:\n{words}")
        time.sleep(0.2)
    return cluster


def leave_room_for_others(leader: int) -> None:
    """Let the session of a process weigh less than others, where Linux groups processes by session.

    vLLM's processes wait for each other by ``sched_yield``. Linux 6.18 then keeps other sessions, and threads of its
    own, from running for tens of seconds unless they weigh more: a request to an Airflow on the same machine took 37 s,
    and 0.06 s so.
    """
    with suppress(OSError):
        Path(f"/proc/{leader}/autogroup").write_text("10")


def stop(folder: Path) -> None:
    """Stop the Ray head that ``start`` started in *folder*, and wait until its processes have ended."""
    note = _note(folder)
    if not note.exists():
        return
    end_session(int(json.loads(note.read_text())["pid"]))
    note.unlink()


def end_session(leader: int) -> None:
    """End all processes of the session that *leader* began, politely first, and wait until they have ended."""
    _signal(leader, signal.SIGTERM)
    end = time.monotonic() + STOP_TIMEOUT_S
    while session(leader):
        if time.monotonic() >= end:
            _signal(leader, signal.SIGKILL)
        time.sleep(0.2)


def _signal(leader: int, number: int) -> None:
    for pid in session(leader):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def session(leader: int) -> list[int]:
    """Return the live processes of the session that *leader* began: all that the head started, wherever they hang."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            members.append(int(stat.parent.name))
    return members


def _note(folder: Path) -> Path:
    return folder / "cluster.json"


def _answers(url: str) -> bool:
    try:
        # A head that asks for a token is up, too.
        return httpx.get(url, timeout=5, trust_env=False).status_code < 500
    except httpx.TransportError:
        return False


def _free_ports(count: int) -> list[int]:
    with_sockets = [socket.socket() for _ in range(count)]
    for one in with_sockets:
        one.bind((HOST, 0))
    ports: list[int] = []
    for one in with_sockets:
        with closing(one):
            ports.append(one.getsockname()[1])
    return ports


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time decide whether to start: several tasks begin together."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
