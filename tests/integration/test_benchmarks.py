"""Every workload of the benchmarks on engines that answer at once: none of them rots between two measurements."""

import json
import time
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from airflow_provider_raylm.cluster.batch.exchange import Answer
from airflow_provider_raylm.specs import BatchSpec, EngineRef, build
from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import harness, kinds, planning, scale
from tests.benchmarks.harness import HERE, Bench, Timing
from tests.benchmarks.workloads import WORKLOADS
from tests.scripted import REF, attempt
from tests.tiny_model import make_tiny_model

ROWS = 40
VALID = json.dumps({"mood": "good", "stars": 1, "sure": True})
# Begins the rows of the large one of two unequal tasks, which has to outlast the small one.
SLOW = "large"


def at_once(fields, contents):
    if "max_tokens" not in fields:
        return [Answer(np.zeros(4, np.float32), "", 1, 0)] * len(contents)
    if "structured_outputs" in fields:
        return [Answer(VALID, "stop", 1, 9)] * len(contents)
    tokens = fields["max_tokens"]
    if contents[0].startswith(SLOW):
        time.sleep(0.5)
    return [Answer("nothing", "stop", 1, tokens) for _ in contents]


@dataclass
class OneProcess:
    """A cluster's face: tasks run here, on a function; jobs that are no tasks do nothing."""

    folder: Path
    python: str = "python"

    def __post_init__(self):
        self._reports = {}
        self._names = count()

    def start(self, verb, payload):
        assert verb == "infer"
        name = f"job-{next(self._names)}"
        spec, ref = build(BatchSpec, payload["batch"]), build(EngineRef, payload["engine"])
        self._reports[name] = attempt(spec, at_once, ref=ref)
        return name

    def finish(self, job, *_):
        return self._reports.pop(job).model_dump(mode="json"), []

    def run(self, *_):
        return {}

    def run_script(self, *_):
        return ""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A bench without Ray."""
    bench = Bench(OneProcess(tmp_path), Path(), {}, 0, 0)
    bench.engine = REF.model_dump(mode="json")
    monkeypatch.setattr(bench, "_session", lambda: 0)
    monkeypatch.setattr(harness, "_watch", lambda session: nullcontext([1.0]))
    monkeypatch.setattr(bench, "first_request", lambda: nullcontext([time.time()]))
    return bench


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload(here, name):
    """Its own side: every row is answered, with all its tokens, and the ratios can be worked out."""
    workload = replace(WORKLOADS[name], rows=ROWS, contenders=("ours",))
    result = benchmarks.side_by_side(here, workload, name, repeats=1)

    assert result["contenders"]["ours"]["completion_tokens"] == ROWS * workload.turns * workload.max_tokens


def few_kinds(here, monkeypatch):
    """Let what rows may be asked beside text of a length have few of them, and nothing to compare with."""
    for name in ("TYPED_ROWS", "ROWS"):
        monkeypatch.setattr(kinds, name, 600)
    here.model = make_tiny_model(here.cluster.folder / "tiny", weights=False)
    monkeypatch.setattr(here, "offline_engine", lambda _: nullcontext())
    monkeypatch.setattr(here, "offline", lambda *_: Timing(1.0, 1.0, 1.0, 1.0, 1.0, 1))


def test_those_on_the_shared_engine(here, monkeypatch):
    """With few rows and windows."""
    monkeypatch.setattr(scale, "LARGE_ROWS", 2_000)
    monkeypatch.setattr(scale, "SMALL_ROWS", 2 * ROWS)
    monkeypatch.setattr(benchmarks, "ROWS_PER_TASK", ROWS)
    monkeypatch.setattr(benchmarks, "CONCURRENCY_ROWS", 600)
    monkeypatch.setattr(scale, "SKEWED", replace(scale.SKEWED, rows=2 * ROWS))
    few_kinds(here, monkeypatch)
    results = {name: one(here, 1, True) for name, one in benchmarks.ON_SHARED.items()}

    for name, result in results.items():
        assert all(value > 0 for value in result["ratios"].values() if isinstance(value, float)), name


def test_those_on_engines_of_their_own(here, monkeypatch):
    """Of the whole DAG its own side."""
    monkeypatch.setattr(benchmarks, "DAG_ROWS", ROWS)
    monkeypatch.setattr(scale, "PREFIXES_ROWS", 600)
    monkeypatch.setattr(here, "deploy", lambda name, **fields: {**here.engine, "task": fields.get("task", "generate")})
    few_kinds(here, monkeypatch)
    monkeypatch.setattr(here, "processor", lambda *_: None)
    results = {name: one(copy(here), 1) for name, one in benchmarks.ON_OWN.items()}

    assert results["dag"]["ratios"]["ours_vs_private_wall"] > 0
    assert results["prefixes"]["ratios"]["ours_vs_anywhere"] > 0
    assert results["embed"]["ratios"]["ours_vs_offline"] > 0
    assert results["lora"]["ratios"]["ours_vs_offline"] > 0


def test_those_without_vllm(here, monkeypatch):
    """With few rows; the engines are below."""
    monkeypatch.setattr(here, "deploy_script", lambda script, *_, **__: here.engine)
    monkeypatch.setattr(scale, "WIDE_CHARACTERS", 1_000)
    null = benchmarks.null(here, (600, 1_200))
    wide = scale.wide(here, (600, 1_200))
    replicas = scale.replicas(here, counts=(1, 2), waves=20)

    assert null["ratios"]["rows_per_s"] > 0
    assert wide["ratios"]["mb_per_s"] > 0
    assert replicas["ratios"]["of_linear"] > 0


def test_their_jobs(cluster):
    """Two engines; a task like any other but that rows go anywhere; the job that small tasks are compared with."""
    bench = Bench(replace(cluster, python="python -m tests.benchmarks.without_affinity"), Path(), {}, 0, 0)
    bench.began = cluster.folder / "began"
    workload = replace(WORKLOADS["prefix"], rows=ROWS, max_tokens=1, from_first_request=True)
    source = workload.write(cluster.folder / "their-rows", "their")
    for script, arguments in [("null_engine.py", ()), ("fixed_engine.py", (1, bench.began))]:
        bench.engine = bench.deploy_script(script, *arguments)
        bench.began.touch()
        # A measured job is looked at as seldom as operators do; here it is only waited for.
        timing = bench.ours(workload, source, poll_interval=0.3)
        bench.teardown(bench.engine)
        assert timing.completion_tokens == workload.new_tokens
        bench.began.unlink()
    cluster.run_script(HERE / "copy_rows.py", source, cluster.folder / "copied")
    assert list((cluster.folder / "copied").iterdir())


def test_those_without_ray():
    """With few files and rows; what a file costs is one request. Of those that wait, see the system tests."""
    assert planning.planning(300)["ratios"]["requests_per_file"] <= 2
    assert planning.resume(1_000_000)["ratios"]["peak_rss_mb"] < 1024
    assert scale.crashed()["ratios"]["with_vs_without"] <= 1.25


def test_every_workload_is_here():
    """One that is added to the benchmarks needs a smoke, too."""
    assert set(benchmarks.WITHOUT_VLLM) == {"null", "wide", "replicas"}
    assert set(benchmarks.WITHOUT_RAY) == {"planning", "resume", "crash", "deferred"}
