"""Runs the contenders on one cluster and takes their times; knows nothing of bars and pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq

from airflow_provider_raylm import local
from tests.benchmarks import offline_server
from tests.benchmarks.workloads import Workload
from tests.clusters import ENGINE_ENVIRON, Cluster

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
HTTP_PORT = 28200
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 900.0
# What people write who cannot hand over all rows at once.
CHUNK = 512
SAME_ENGINE = {"offline_in_chunks": "offline"}
# The engine works when its scheduler takes so much of a core.
LOOK_PERIOD_S = 0.2
BUSY = 0.5


@dataclass(frozen=True)
class Timing:
    """What one contender took, once.

    Attributes:
        rows_per_s: steady state: rows after the first that came out, per second until the last; where the workload
            says so, all rows, from the first request that the engine got.
        tokens_per_s: the same in generated tokens.
        first_row_s: from the start of the task until its first rows were out.
        total_s: from the start of the task to its end. No engine is loaded in it but a private one.
        peak_rss_mb: most memory that the processes had which were started for the task, in MiB.
        completion_tokens: generated tokens, all rows.
    """

    rows_per_s: float
    tokens_per_s: float
    first_row_s: float
    total_s: float
    peak_rss_mb: float
    completion_tokens: int


class Bench:
    """One cluster, one model of a size, and the ways to ask it.

    Attributes:
        offline_kwargs: what vLLM alone is told beside, where a field of ours says it to the engine.
        engine: reference of the shared engine.
        endpoint: of vLLM's own server.
        began: the file that an engine without vLLM makes with its first row.
    """

    def __init__(self, cluster: Cluster, model: Path, engine_kwargs: Mapping[str, Any], gpus: int, cpus: float) -> None:
        self.cluster = cluster
        self.model = model
        self.engine_kwargs = dict(engine_kwargs)
        self.offline_kwargs: dict[str, Any] = {}
        self.engine: dict[str, Any] = {}
        self.endpoint = ""
        self.began: Path | None = None
        self._gpus = gpus
        self._cpus = cpus
        self._offline: dict[str, subprocess.Popen[str]] = {}

    def deploy(self, name: str, **fields: Any) -> dict[str, Any]:
        """Deploy a shared engine and return its reference."""
        spec = {
            "name": name,
            "model": str(self.model),
            "gpus_per_worker": self._gpus,
            "num_cpus": self._cpus,
            "engine_kwargs": self.engine_kwargs,
            "lease": {"idle_timeout": 7200},
            **fields,
        }
        labels = {"installation": "benchmark", "dag_id": "benchmark", "run_id": name, "engine": name}
        payload = {"engine": spec, "labels": labels, "replace": False}
        return self.cluster.finish(self.cluster.start("deploy", payload), timeout=START_TIMEOUT_S)[0]

    def deploy_script(self, script: str, *arguments: Any, replicas: int = 1) -> dict[str, Any]:
        """Run a script of this folder that deploys an application by its name, and return a reference to it."""
        application = f"benchmark-{script.partition('_')[0]}"
        self.cluster.run_script(HERE / script, application, *arguments)
        labels = {"installation": "benchmark", "dag_id": "benchmark", "run_id": application, "engine": application}
        return {
            "application": application,
            "deployment": "engine",
            "model": "none",
            "fingerprint": application,
            "labels": labels,
            "lease": {},
            "replicas": replicas,
        }

    def teardown(self, engine: Mapping[str, Any]) -> None:
        """Delete an engine."""
        self.cluster.run("teardown", {"application": engine["application"]})

    @contextmanager
    def offline_engine(self, contender: str) -> Iterator[None]:
        """Keep a `vllm.LLM` loaded beside the shared engine; idle engines take no CPU."""
        command = [sys.executable, "-m", "tests.benchmarks.offline_server", str(self.model)]
        command.append(json.dumps(self.engine_kwargs | self.offline_kwargs))
        environ = {"VLLM_USE_FASTOKENS": str(int(contender.endswith("fastokens")))}
        with _process(command, environ, stdin=subprocess.PIPE) as process:
            self._offline[contender] = process
            _answer_of(process)
            yield
        del self._offline[contender]

    @contextmanager
    def http_endpoint(self) -> Iterator[None]:
        """Keep vLLM's own OpenAI server up beside the shared engine."""
        arguments = [
            f"--{name.replace('_', '-')}={value}" for name, value in self.engine_kwargs.items() if value is not True
        ]
        arguments += [f"--{name.replace('_', '-')}" for name, value in self.engine_kwargs.items() if value is True]
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-m", module, "--host=127.0.0.1", f"--port={HTTP_PORT}", f"--model={self.model}"]
        self.endpoint = f"http://127.0.0.1:{HTTP_PORT}"
        with _process([*command, *arguments, "--performance-mode=throughput", "--disable-log-stats"]) as process:
            end = time.monotonic() + START_TIMEOUT_S
            while not _healthy(f"{self.endpoint}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    raise TimeoutError("vLLM's API server did not come up")
                time.sleep(1)
            yield

    def ours(self, workload: Workload, *sources: Path, poll_interval: float = 3.0, **batch: Any) -> Timing:
        """Run the shipped pipeline as a task does; several sources are several tasks at a time.

        It is looked at as often as operators do: the dashboard takes its share of two cores for each look.
        """
        outputs = [self.cluster.folder / f"out-{time.monotonic_ns()}-{number}" for number in range(len(sources))]
        with _watch(self._session()) as memory, self.first_request() as began:
            started = time.time()
            jobs = [
                self.cluster.start(
                    "infer",
                    {
                        "engine": self.engine,
                        "batch": {"source": str(source), "output": str(output), **workload.question, **batch},
                    },
                )
                for source, output in zip(sources, outputs, strict=True)
            ]
            ends = (self.cluster.finish(job, JOB_TIMEOUT_S, poll_interval) for job in jobs)
            reports = [report for report, _ in ends]
            ended = time.time()
        for report in reports:
            if report["rows_written"] != workload.rows:
                raise RuntimeError(f"{report} of {workload.rows} rows")
        parts = sorted((p for output in outputs for p in output.glob("part-*")), key=lambda p: p.stat().st_mtime)
        outcome = {
            "first_at": parts[0].stat().st_mtime,
            "last_at": parts[-1].stat().st_mtime,
            "first_rows": pq.read_metadata(parts[0]).num_rows,
            "rows": workload.rows * len(sources),
            "completion_tokens": sum(report["completion_tokens"] for report in reports),
        }
        for output in outputs:
            shutil.rmtree(output)
        return _timing(workload, outcome, started, ended, memory[0], began)

    def processor(self, contender: str, workload: Workload, source: Path) -> Timing:
        """Run one of Ray Data's own processors: stock, http or private."""
        request, result = (self.cluster.folder / f"{contender}-{end}.json" for end in ("task", "result"))
        task = {
            "contender": contender,
            "source": str(source),
            # As many as ours makes of the table: rates are taken from the first block that comes out.
            "blocks": max(workload.rows // workload.batch.get("block_rows", 256), 4),
            "sampling": workload.sampling,
            "turns": workload.turns,
            "deployment": self.engine.get("deployment"),
            "application": self.engine.get("application"),
            "model": str(self.model),
            "endpoint": self.endpoint,
            "model_source": str(self.model),
            "engine_kwargs": self.engine_kwargs,
            "bundle": {"CPU": self._cpus, **({"GPU": self._gpus} if self._gpus else {})},
            "environ": ENGINE_ENVIRON,
        }
        request.write_text(json.dumps(task))
        with _watch(self._session()) as memory, self.first_request() as began:
            started = time.time()
            self.cluster.run_script(HERE / "processors.py", request, result, timeout=JOB_TIMEOUT_S)
            ended = time.time()
        return _timing(workload, json.loads(result.read_text()), started, ended, memory[0], began)

    def offline(self, contender: str, workload: Workload, source: Path) -> Timing:
        """Ask the loaded `vllm.LLM`; all its rows come out at once."""
        process = self._offline[SAME_ENGINE.get(contender, contender)]
        assert process.stdin is not None
        pids = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        chunk = CHUNK if contender == "offline_in_chunks" else None
        told = {"kind": workload.kind, "schema": workload.schema, "adapters": dict(workload.adapters)}
        task = {"source": str(source), "sampling": workload.sampling, "chunk": chunk, **told}
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer = _answer_of(process)
        seconds, tokens = answer["seconds"], answer["completion_tokens"]
        if workload.skewed:
            print(f"bench: {contender}: mean {tokens / workload.rows:.0f} tokens, 99 % below {answer['longest']}")
        rss = _rss_mb(pids)
        return Timing(workload.rows / seconds, tokens / seconds, seconds, seconds, rss, tokens)

    def run(self, contender: str, workload: Workload, source: Path) -> Timing:
        """Run a contender by name."""
        if contender == "ours":
            return self.ours(workload, source)
        if contender.startswith("offline"):
            return self.offline(contender, workload, source)
        return self.processor(contender, workload, source)

    @contextmanager
    def first_request(self) -> Iterator[list[float]]:
        """Watch the shared engine; the list's one element is in the end when it first had something to do, Unix time.

        By the CPU that its scheduler takes: nothing else tells of both ways to it, ours and Ray Data's.
        """
        found: list[float] = []
        over = threading.Event()

        def look() -> None:
            cores = self._engine_cores()
            before = cpu_s(cores)
            while not over.wait(LOOK_PERIOD_S):
                now = cpu_s(cores)
                if now - before > BUSY * LOOK_PERIOD_S:
                    found.append(time.time() - LOOK_PERIOD_S)
                    return
                before = now

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()
            if self.began is not None:
                found[:] = [self.began.stat().st_ctime]

    def _engine_cores(self) -> list[psutil.Process]:
        return self.cluster.engine_cores(self.engine["application"]) if self.engine else []

    def _session(self) -> int:
        return int(json.loads((self.cluster.folder / "ray" / "cluster.json").read_text())["pid"])


def as_json(timing: Timing) -> dict[str, float]:
    """Return a timing as rounded JSON values."""
    return {name: round(value, 3) for name, value in asdict(timing).items()}


def _timing(
    workload: Workload,
    outcome: Mapping[str, Any],
    started: float,
    ended: float,
    rss: float,
    began: Sequence[float],
) -> Timing:
    if workload.from_first_request:
        rate = outcome["rows"] / (outcome["last_at"] - began[0])
    else:
        rate = (outcome["rows"] - outcome["first_rows"]) / max(outcome["last_at"] - outcome["first_at"], 1e-6)
    tokens = outcome["completion_tokens"]
    return Timing(rate, rate * tokens / outcome["rows"], outcome["first_at"] - started, ended - started, rss, tokens)


@contextmanager
def _process(
    command: list[str], environ: Mapping[str, str] | None = None, **kwargs: Any
) -> Iterator[subprocess.Popen[str]]:
    environ = {**os.environ, **ENGINE_ENVIRON, **(environ or {})}
    log = (REPOSITORY / "build" / "bench" / "engine.log").open("a")
    with (
        log,
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environ,
            text=True,
            stdout=subprocess.PIPE if "stdin" in kwargs else log,
            stderr=log,
            start_new_session=True,
            **kwargs,
        ) as process,
    ):
        # As the cluster that it is compared with does.
        local.leave_room_for_others(process.pid)
        try:
            yield process
        finally:
            local.end_session(process.pid)


def _answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(offline_server.SENTINEL):
            return dict(json.loads(line.removeprefix(offline_server.SENTINEL)))
    raise RuntimeError("the offline engine ended; see build/bench/engine.log")


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


@contextmanager
def _watch(session: int) -> Iterator[list[float]]:
    """Watch the memory of the processes that the session starts from now on; the peak is the list's one element."""
    before = set(local.session(session))
    peak = [0.0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(1):
            peak[0] = max(peak[0], _rss_mb([pid for pid in local.session(session) if pid not in before]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Return the CPU seconds that processes have taken so far; one that is gone took none."""
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _rss_mb(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_info().rss
    return total / 2**20
