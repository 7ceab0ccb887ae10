"""Where faults happen: a cluster, an engine that writes down what it is asked, tasks on it, and the accounts after."""

import io
import json
import os
import random
import signal
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import httpx
import pyarrow.parquet as pq

from airflow_provider_raylm.cluster.batch.window import Window
from airflow_provider_raylm.errors import RayLMError
from airflow_provider_raylm.naming import application_name
from airflow_provider_raylm.specs import Labels
from tests.chaos.marks import HOLD, WITNESS
from tests.clusters import Cluster
from tests.offline import ENGINE_KWARGS
from tests.s3 import BUCKET, Server
from tests.standalone import Airflow, Standing
from tests.tiny_model import make_tiny_model

WITNESSED = {**ENGINE_KWARGS, "max_num_seqs": 256, "logits_processors": ["tests.chaos.witness:Witness"]}
INSTALLATION = "chaos"
CONNECTION = "raylm_chaos"
LEASE = {"idle_timeout": 3600, "max_lifetime": 36_000}
BLOCK_ROWS = 64
FIRST_PART_TIMEOUT_S = 120.0
JOB_TIMEOUT_S = 900.0
# Of one core: vLLM's processes look around a little while they wait.
IDLE_PERCENT = 15


@dataclass
class Accounts:
    """What became of the rows of a case, and what it left behind."""

    rows_expected: int = 0
    rows_written: int = 0
    rows_lost: int = 0
    rows_duplicated: int = 0
    rows_quarantined: int = 0
    rows_redone: int = 0
    engines_left: int = 0
    processes_left: int = 0
    recovery_s: float = 0.0


@dataclass
class Scene:
    """One cluster with one engine, as a run has it; and an Airflow.

    Attributes:
        cluster: where the engines are.
        chance: decides moments and rows.
        stack: closed when the scene is over.
        engine_kwargs: of its engines.
        engine: the one that faults strike.
        s3: the S3 server that the cluster's processes reach.
        standing: the Airflow; default: one of its own, from when it is asked for to the stack's end.
        runs_on: the cluster as Airflow's tasks have it; default: the same.
    """

    cluster: Cluster
    chance: random.Random
    stack: ExitStack
    engine_kwargs: dict = field(default_factory=lambda: WITNESSED)
    engine: dict = field(default_factory=dict)
    s3: Server | None = None
    standing: Standing | None = None
    runs_on: Cluster | None = None
    _connected: Airflow | None = None

    def __post_init__(self):
        self.runs_on = self.runs_on or self.cluster
        self._others = self._applications()

    def spec(self, name, **fields):
        """Return the spec of an engine; with the scene's own arguments it has a witness."""
        return {
            "name": name,
            "model": str(make_tiny_model(self.cluster.folder / "model")),
            "served_model_name": "tiny",
            "gpus_per_worker": 0,
            "num_cpus": 0.3,
            "hang_timeout": 60,
            "engine_kwargs": self.engine_kwargs,
            "env": {WITNESS: str(self.witness), HOLD: str(self.hold)},
            "lease": LEASE,
            **fields,
        }

    @property
    def airflow(self):
        if self.standing is None:
            folders = [Path(__file__).parent / "dags"]
            self.standing = Standing(self.cluster.folder, folders, airflow_environ())
            self.stack.callback(self.standing.end)
        airflow = self.standing.airflow
        if airflow is not self._connected:
            airflow.connect(CONNECTION, **self.runs_on.connection())
            self._connected = airflow
        return airflow

    @property
    def witness(self):
        return self.cluster.folder / "witness"

    @property
    def hold(self):
        """While this file exists, scripted engines do not answer rows that are marked with ``HELD``."""
        return self.cluster.folder / "hold"

    def asked(self):
        """Return how many requests have reached the model so far."""
        return self.witness.stat().st_size if self.witness.exists() else 0

    def wanted(self, name, **fields):
        """Return what a job is told that deploys an engine."""
        return {"engine": self.spec(name, **fields), "labels": labels(name), "replace": False}

    def deploy(self, name, **fields):
        return self.cluster.run("deploy", self.wanted(name, **fields))

    def described(self, engine):
        """Return what an engine says of itself."""
        payload = {"delete": [], "max_age": None, "installation": INSTALLATION}
        found = self.cluster.run("sweep", payload)["engines"]
        return next(one for one in found if one["application"] == engine["application"])

    def teardown(self, engine):
        return self.cluster.run("teardown", {"application": engine["application"]})

    def table(self, rows, strange=lambda i: f"row {i}"):
        """Write *rows* rows, with what *strange* returns for their number as text; return the folder."""
        folder = self.cluster.folder / f"in-{time.monotonic_ns()}"
        folder.mkdir()
        lines = (json.dumps({"n": i, "text": strange(i)}) for i in range(rows))
        (folder / "0.jsonl").write_text("\n".join(lines))
        return folder

    def table_on_s3(self, rows):
        """Do as ``table`` on the S3 server."""
        folder = f"s3://{BUCKET}/in-{time.monotonic_ns()}"
        lines = (json.dumps({"n": i, "text": f"row {i}"}) for i in range(rows))
        fsspec.filesystem("s3").pipe_file(f"{folder}/0.jsonl", "\n".join(lines).encode())
        return folder

    def batch(self, source, **fields):
        """Return a task over *source* with an output of its own."""
        output = f"{source}-out"
        return {
            "source": str(source),
            "prompt": "${text}",
            "output": output,
            "max_tokens": 32,
            "temperature": 0,
            "ignore_eos": True,
            "block_rows": BLOCK_ROWS,
            "max_failed_fraction": 1,
            **fields,
        }

    def start(self, batch, engine=None):
        return self.cluster.start("infer", {"engine": engine or self.engine, "batch": batch})

    def finish(self, job):
        return self.cluster.finish(job, timeout=JOB_TIMEOUT_S)[0]

    def retry(self, batch, tries=5):
        """Run the task as Airflow retries it, until an attempt succeeds."""
        for attempt in range(tries):
            try:
                return self.finish(self.start(batch))
            except RayLMError:
                if attempt == tries - 1:
                    raise
        raise AssertionError

    def at_a_random_moment(self, batch, within=2.0):
        """Wait until the task writes something new, and some moments more."""
        before = len(parts(batch))
        # A look at the S3 server takes its share of the cores.
        period = 0.3 if batch["output"].startswith("s3://") else 0.02
        self.until(lambda: len(parts(batch)) > before, FIRST_PART_TIMEOUT_S, period)
        time.sleep(self.chance.uniform(0, within))

    @contextmanager
    def accounted(self, batch, rows):
        """Yield the accounts of one task; they are complete when the body is over."""
        accounts = Accounts(rows_expected=rows)
        asked = self.asked()
        yield accounts
        ids = written(batch["output"])
        failed = written(f"{batch['output']}/_quarantine")
        accounts.rows_written = len(ids)
        accounts.rows_quarantined = len(failed)
        accounts.rows_duplicated = len(ids) + len(failed) - len({*ids, *failed})
        accounts.rows_lost = rows - len({*ids, *failed})
        accounts.rows_redone = max(self.asked() - asked - rows, 0)

    def replica(self, application=None):
        """Return the process of the engine's replica, or None."""
        return self.process(f"{application or self.engine['application']}:engine")

    def inference_jobs(self):
        """Return what Ray says of the inference jobs, also of those that have ended."""
        jobs = self._dashboard_says("/api/jobs/")
        return [job for job in jobs if "airflow_provider_raylm.cluster infer" in job["entrypoint"]]

    def _dashboard_says(self, path):
        headers = {"Authorization": f"Bearer {self.cluster.token}"}
        return httpx.get(f"{self.cluster.url}{path}", headers=headers, timeout=30).raise_for_status().json()

    def until(self, condition, timeout, period=0.5):
        """Wait until *condition* holds, and return what it returned."""
        end = time.monotonic() + timeout
        while not (met := condition()):
            if time.monotonic() >= end:
                raise TimeoutError(f"not so after {timeout:g} s")
            time.sleep(period)
        return met

    def engine_core(self):
        return self.cluster.engine_cores(self.engine["application"])[0]

    def is_idle(self):
        """Return whether the engine computes nothing."""
        core = self.engine_core()
        busy = sum(p.cpu_percent(interval=1) for p in [core, *core.children(recursive=True)])
        return busy < IDLE_PERCENT

    def driver(self, verb="infer"):
        """Return the process of a job's driver, or None; not the shell that Ray runs it by, which dies alone."""
        found = self.cluster.processes(f"airflow_provider_raylm.cluster {verb}")
        return next((process for process in found if "-c" not in process.info["cmdline"][:2]), None)

    def dashboard(self):
        """Return the process that answers the Jobs API."""
        return self.process("dashboard/dashboard.py")

    def replicas(self, application):
        """Return the processes of an engine's replicas."""
        return self.cluster.replicas(application)

    def process(self, words):
        """Return a process with these words in its command line, or None."""
        return next(iter(self.cluster.processes(words)), None)

    def engines(self):
        """Return the applications that have come since the scene began, in whatever state, but for its own engine."""
        return self._applications() - self._others - {self.engine.get("application")}

    def _applications(self):
        return {*self._dashboard_says("/api/serve/applications/")["applications"]}

    def strays_after_a_while(self):
        """Return how many strays there are when they had half a minute to end."""
        end = time.monotonic() + 30
        while (count := len(self.strays())) and time.monotonic() < end:
            time.sleep(1)
        return count

    def strays(self):
        """Return vLLM processes that belong to no replica, and drivers and stages of no running job."""
        kept = {
            child.pid
            for replica in self.cluster.processes("ServeReplica")
            for child in replica.children(recursive=True)
        }
        words = ("VLLM::", "airflow_provider_raylm.cluster infer", "AnswerAndWrite")
        return [process for word in words for process in self.cluster.processes(word) if process.pid not in kept]


def airflow_environ(run_timeout_s=120):
    """Return what the DAGs of faults ask of their Airflow.

    Args:
        run_timeout_s: seconds that a run with an engine of its own has.
    """
    return {
        "AIRFLOW__RAYLM__INSTALLATION": INSTALLATION,
        # So that another triggerer, where there is one, takes over sooner.
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "15",
        "CHAOS_RUN_TIMEOUT_S": str(run_timeout_s),
    }


def application(name):
    return application_name(Labels(**labels(name)))


def labels(name):
    return {"installation": INSTALLATION, "dag_id": "chaos", "run_id": "run", "engine": name}


def at_most_redone(batch):
    """Return how many rows a task that is killed may have to ask again: those in flight, and three blocks."""
    window = Window(batch.get("in_flight_rows"), batch["block_rows"])
    window.fit(WITNESSED["max_num_seqs"], 1)
    return window.most_rows + 3 * batch["block_rows"]


def parts(batch):
    """Return the paths of the parts that a task has written, on any storage."""
    return _parts(batch["output"])


def _parts(folder):
    fs, path = fsspec.url_to_fs(folder)
    fs.invalidate_cache()
    return [name for name in fs.find(path, maxdepth=1) if name.rpartition("/")[2].startswith("part-")]


def written(folder):
    """Return the ids of the rows in a folder of part files."""
    fs, _ = fsspec.url_to_fs(str(folder))
    ids = []
    for path in _parts(str(folder)):
        ids += pq.read_table(io.BytesIO(fs.cat_file(path)), columns=["raylm_row_id"])[0].to_pylist()
    return ids


def kill(process):
    """Kill without a chance to clean up."""
    os.kill(process.pid, signal.SIGKILL)
