"""Real Ray clusters for tests, and the way to run a job on one."""

import json
import os
import secrets
import shlex
import shutil
import socket
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from airflow_provider_raylm import local
from airflow_provider_raylm.following import Follower
from airflow_provider_raylm.polling import Watch
from airflow_provider_raylm.ray_jobs import JobRequest, RayJobsClient

REPOSITORY = Path(__file__).parents[1]

# What vLLM on CPUs needs on a small machine without a network: threads that spin while they wait, or are bound to the
# same cores as another engine's, starve the other processes; Ray runs its workers at niceness 15, which puts the engine
# behind whatever else the machine does; and Serve's controller looks at everything ten times a second.
ENGINE_ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_worker_niceness": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}

# Outside Ray's worker ports (10002 to 19999) and the kernel's own choices for clients (from 32768 on).
_FIRST_PORT, _LAST_PORT, _PORTS_EACH = 28260, 28900, 40
# It is bound for as long as this process lives.
_claim = socket.socket()


@cache
def _own_ports():
    """Return ports that no other process takes: tests of several kinds run at the same time."""
    for first in range(_FIRST_PORT, _LAST_PORT, _PORTS_EACH):
        with suppress(OSError):
            _claim.bind((local.HOST, first))
            return iter(range(first + 1, first + _PORTS_EACH))
    raise RuntimeError("all ports for tests are taken")


def own_port():
    """Return a port that nobody else has."""
    return next(_own_ports())


@dataclass
class Cluster:
    """A Ray head on loopback.

    Attributes:
        folder: Ray's session and a place for files.
        url: the dashboard.
        token: asked for by the dashboard, or None when authentication is off.
        environ: of its processes.
        python: what runs its jobs.
    """

    folder: Path
    url: str
    token: str | None
    environ: dict[str, str]
    python: str = "python"

    @property
    def leader(self):
        """The id of the session of the head's processes."""
        return int(json.loads((self.folder / "ray" / "cluster.json").read_text())["pid"])

    @property
    def logs(self):
        """The folder of Ray's logs."""
        return self.folder / "ray" / "session_latest" / "logs"

    def processes(self, words=""):
        """Return the processes of the cluster that have these words in their command line."""
        members = set(local.session(self.leader))
        found = []
        for process in psutil.process_iter(["cmdline"]):
            # A job's driver leads a session of its own, below the head's.
            with suppress(psutil.Error):
                if process.info["cmdline"] and (process.pid in members or process.ppid() in members):
                    members.add(process.pid)
                    if words in " ".join(process.info["cmdline"]):
                        found.append(process)
        return found

    def replicas(self, application):
        """Return the processes of an engine's replicas."""
        return self.processes(f"{application}:engine")

    def engine_cores(self, application):
        """Return the processes of vLLM's schedulers, children of the engine's replicas."""
        children = [child for replica in self.replicas(application) for child in replica.children()]
        return [child for child in children if "EngineCore" in " ".join(child.cmdline())]

    def listening_beyond_loopback(self):
        """Return (command line, port) of the head's processes that other machines could connect to."""
        found = []
        for pid in local.session(self.leader):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                for connection in process.net_connections("inet"):
                    if connection.status == "LISTEN" and connection.laddr.ip.removeprefix("::ffff:") != local.HOST:
                        found.append((" ".join(process.cmdline()).strip(), connection.laddr.port))
        return found

    @property
    def gcs_address(self):
        """Where another node joins."""
        written = self.folder / "ray" / "ray_current_cluster"
        # The last thing that a head does when it starts.
        end = time.monotonic() + 30
        while not written.exists() and time.monotonic() < end:
            time.sleep(0.1)
        return written.read_text().strip()

    def restart(self):
        """Start the head anew at the same address, after its processes were killed."""
        local.stop(self.folder / "ray")
        local.start(self.folder / "ray", int(self.url.rpartition(":")[2]), environ=self.environ)

    def client(self, **kwargs):
        """Return a client of the dashboard."""
        return RayJobsClient(self.url, **{"token": self.token, "python": self.python, **kwargs})

    def connection(self):
        """Return the raylm connection's fields."""
        host, port = self.url.removeprefix("http://").split(":")
        extra = json.dumps({"python": self.python})
        return {"conn_type": "raylm", "host": host, "port": int(port), "password": self.token or "", "extra": extra}

    def connection_uri(self):
        """Return the raylm connection as Airflow reads it from the environment."""
        return "{conn_type}://:{password}@{host}:{port}".format(**self.connection())

    def start(self, verb, payload, given=None, **kwargs):
        """Submit a job, with what is *given* to it beside its payload, and return its id."""
        job = f"test-{verb}-{time.time_ns()}"
        with closing(self.client(**kwargs)) as jobs:
            assert jobs.submit(JobRequest(job, verb, payload, **(given or {})))
        return job

    def finish(self, job, timeout=600.0, poll_interval=0.5, **kwargs):
        """Wait for a job and return (result, the lines it said); its error is raised."""
        said = []
        with closing(self.client(**kwargs)) as jobs:
            return Follower(jobs, job, said.append, poll_interval).wait(Watch(deadline=time.time() + timeout)), said

    def run(self, verb, payload, given=None, **kwargs):
        """Run a job to its end and return its result; its error is raised."""
        return self.finish(self.start(verb, payload, given, **kwargs), **kwargs)[0]

    def run_script(self, script, *arguments, timeout=300):
        """Run a script as a Ray job of its own, through Ray's own client, and return its log."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self.url, headers={"Authorization": f"Bearer {self.token}"})
        job = client.submit_job(entrypoint=shlex.join(["python", str(script), *map(str, arguments)]))
        deadline = time.monotonic() + timeout
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(1)
        log = client.get_job_logs(job)
        assert client.get_job_status(job) == "SUCCEEDED", log[-3000:]
        return log


@contextmanager
def ray_cluster(*, token=True, cpus=None, other_nodes=False):
    """Start a Ray head and stop it, with all its processes and files, in the end.

    Args:
        token: whether it asks for one.
        cpus: of the head; default: the machine's.
        other_nodes: whether others may join it; then it listens beyond loopback.
    """
    folder = Path(tempfile.mkdtemp(prefix="raylm-"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} | ENGINE_ENVIRON
    secret = secrets.token_hex(16) if token else None
    # The witness, and engines that are scripted, are imported from the repository.
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret} if secret else {"RAY_AUTH_MODE": "disabled"})
    environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"} if other_nodes else {}
    try:
        started = local.start(folder / "ray", own_port(), cpus=cpus, environ=environ)
        yield Cluster(folder, started.dashboard_url, secret, environ)
    finally:
        local.stop(folder / "ray")
        shutil.rmtree(folder, ignore_errors=True)
