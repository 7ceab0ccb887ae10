"""What `raylm preview` asks of which engine, what it prints, and what it leaves behind: nothing."""

import json
import os
import signal
import textwrap

import pytest

from airflow_provider_raylm.cli import chosen
from airflow_provider_raylm.cli.main import main
from airflow_provider_raylm.errors import BatchError, EngineError
from airflow_provider_raylm.operators.raylm import installation
from airflow_provider_raylm.ray_jobs import JobRequest
from airflow_provider_raylm.specs.engine import COMMAND_RUN
from airflow_provider_raylm.testing import FakeRayJobs

DAG = """
from airflow.sdk import DAG
from airflow_provider_raylm.authoring import shared_engine

dag = DAG("d", schedule=None, params={"folder": "/in"})
with dag, shared_engine("e", model="{{ params.get('model', 'm') }}") as engine:
    label = engine.infer("label", source="{{ params.folder }}/{{ ds }}", prompt="${text}", output="/out/label")
    engine.infer("reply", source=label.output, prompt="${text}", output="/out/reply")
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    (tmp_path / "dag.py").write_text(textwrap.dedent(DAG))
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(tmp_path))
    monkeypatch.setattr("airflow.settings.DAGS_FOLDER", str(tmp_path))
    fake = FakeRayJobs()
    fake.report("label", 1_000)
    with fake.installed():
        yield fake


def deploy(fake, run_id="manual__1", engine="e", dag_id="d", model="m", **fields):
    labels = {"installation": installation(), "dag_id": dag_id, "run_id": run_id, "engine": engine}
    payload = {"engine": {"name": engine, "model": model, **fields}, "labels": labels, "replace": False}
    assert fake.submit(JobRequest(f"deploy-{run_id}-{dag_id}-{engine}", "deploy", payload))
    return next(reversed(fake.engines))


def previewed(fake, *options, task="label"):
    """Return the exit status and the request of the preview."""
    status = main(["preview", "d", task, *options])
    requests = [request for request in fake.submitted if request.verb == "preview"]
    return status, requests[-1] if requests else None


def test_rows_are_asked_of_the_engine_that_runs_for_the_dag(fake, capsys):
    """With the task's rendered spec; rows are printed, and are nowhere else."""
    application = deploy(fake)
    deploy(fake, dag_id="other")
    status, request = previewed(fake, "--rows", "2", "--conf", '{"folder": "/there"}', "--logical-date", "2026-02-03")

    assert status == 0
    assert request.payload["engine"]["application"] == application
    assert request.payload["batch"]["source"] == "/there/2026-02-03"
    assert (request.payload["rows"], request.payload["texts"]) == (2, True)
    out = capsys.readouterr().out
    assert out.count("label: an answer") == 2
    assert "2 tokens in, 1 out, 0.5 s" in out
    assert "2 rows asked of m: 2 answered, 0 failed" in out
    log = fake.logs(request.submission_id)
    assert "an answer" not in log
    assert "an answer" not in request.wire()
    assert len(fake.engines) == 2


def test_another_previews_engine_is_not_the_one_that_runs_for_the_dag(fake):
    """It ends with that one; and who looks at an engine finds the jobs that concern it."""
    application = deploy(fake)
    deploy(fake, run_id=f"{COMMAND_RUN}0a1b2c")

    _, request = previewed(fake)
    assert request.payload["engine"]["application"] == request.metadata["application"] == application
    assert previewed(fake, "--engine", "temporary")[0] == 0
    told = {one.verb: one.metadata["application"] for one in fake.submitted[-3:]}
    assert set(told) == {"deploy", "preview", "teardown"}
    assert len(set(told.values())) == 1


def test_each_command_has_a_pad_of_its_own(fake):
    """Which would hide nothing twice."""
    deploy(fake)
    pads = {previewed(fake)[1].pad for _ in range(2)}
    assert len(pads) == 2
    assert all(pad not in repr(request).encode() for pad in pads for request in fake.submitted)


def test_failed_rows_are_told_by_reason(fake, monkeypatch, capsys):
    """A preview in which nothing was answered is none that went well."""
    application = deploy(fake)
    counts = ({"seconds": 1.0, "reason": "null_value"}, {"seconds": 1.0, "reason": "null_value"})
    rows = [{"row_id": str(number), "message": "column 'text' is \x1b[31mnull"} for number in range(2)]

    def answer(payload, request):
        from airflow_provider_raylm.sealing import seal
        from airflow_provider_raylm.specs.previews import PlanReport, PreviewReport

        plan = PlanReport(files=1, rows=2, bytes=3, columns={}, answers={})
        sealed = seal(json.dumps(rows), request.pad)
        return PreviewReport(plan=plan, counts=counts, seconds=1.0, capacity=2, replicas=1, sealed=sealed)

    monkeypatch.setattr(fake, "_preview", answer)
    status, _ = previewed(fake)
    out = capsys.readouterr().out
    assert status == 1
    assert "failed: null_value: column 'text' is \ufffd[31mnull" in out
    assert "0 answered, 2 failed: null_value 2" in out
    assert application in fake.engines


def test_no_engine_or_several(fake, capsys):
    """What to do is said, and nothing is deployed for it."""
    assert previewed(fake) == (1, None)
    assert "--engine temporary" in capsys.readouterr().err
    applications = [deploy(fake, f"manual__{number}") for number in (1, 2)]
    assert previewed(fake)[0] == 1
    err = capsys.readouterr().err
    assert all(one in err for one in applications)
    assert previewed(fake, "--engine", "e")[0] == 1
    status, request = previewed(fake, "--engine", applications[1])
    assert (status, request.payload["engine"]["application"]) == (0, applications[1])
    assert previewed(fake, "--engine", "nobody")[0] == 1
    assert "No 'nobody' runs" in capsys.readouterr().err


def test_an_engine_of_another_spec_is_used_and_told(fake, capsys):
    """The author may have changed the DAG since."""
    deploy(fake, model="before")
    assert previewed(fake)[0] == 0
    assert "from another spec than the DAG has now" in capsys.readouterr().err


def test_a_temporary_engine_is_deployed_and_torn_down(fake):
    """Of the task's own spec, with a lease that ends it if nobody can."""
    running = deploy(fake)
    status, request = previewed(fake, "--engine", "temporary", "--conf", '{"model": "other"}')

    assert status == 0
    assert [one.verb for one in fake.submitted] == ["deploy", "deploy", "preview", "teardown"]
    deployed = fake.submitted[1].payload
    assert (deployed["engine"]["model"], deployed["engine"]["lease"]["idle_timeout"]) == ("other", 600)
    assert deployed["labels"]["run_id"].startswith("preview__")
    assert request.payload["engine"]["application"] != running
    assert list(fake.engines) == [running]


@pytest.mark.parametrize("verb", ["_deploy", "_preview"])
@pytest.mark.parametrize("end", ["error", "interrupt", "terminate"])
def test_a_temporary_engine_is_torn_down_whatever_happens(fake, monkeypatch, capsys, verb, end):
    """An error, Ctrl-C or SIGTERM, while it is deployed or asked; what went wrong first is what is said."""
    before = getattr(fake, verb)

    def fail(payload, request):
        if verb == "_deploy":
            before(payload, request)
        if end == "error":
            raise BatchError("no such column")
        if end == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        return before(payload, request)

    monkeypatch.setattr(fake, verb, fail)
    if end == "terminate":
        with pytest.raises(SystemExit, match="143"):
            previewed(fake, "--engine", "temporary")
    else:
        assert previewed(fake, "--engine", "temporary")[0] == (1 if end == "error" else 130)
    assert fake.engines == {}
    assert ("no such column" in capsys.readouterr().err) == (end == "error")


def test_a_temporary_engine_that_cannot_be_torn_down(fake, monkeypatch, capsys):
    """Is told, with what ends it."""

    def fail(payload, request):
        raise EngineError("still there")

    monkeypatch.setattr(fake, "_teardown", fail)
    assert previewed(fake, "--engine", "temporary")[0] == 1
    assert "raylm engines stop raylm-e-" in (err := capsys.readouterr().err)
    assert f"after {chosen.LEASE.idle_timeout:g} idle seconds" in err


def test_other_files_in_place_of_the_source(fake):
    """Where it is what another task writes, which has not run."""
    deploy(fake)
    _, request = previewed(fake, task="reply")
    assert request.payload["batch"]["source"] == "/out/label"
    _, request = previewed(fake, "--source", "/a.csv", "--source", "/b.csv", task="reply")
    assert request.payload["batch"]["source"] == ["/a.csv", "/b.csv"]


def test_what_cannot_be_asked_for(fake, capsys):
    """Is refused before anything is submitted."""
    deploy(fake)
    assert previewed(fake, "--rows", "101") == (1, None)
    assert "at most 100" in capsys.readouterr().err
    assert previewed(fake, task="deploy_e") == (1, None)
    for bad in (["--rows", "0"], ["--conf", "[1]"], ["--conf", "{"], ["--xcom", "a"], ["--logical-date", "x"]):
        with pytest.raises(SystemExit, match="2"):
            previewed(fake, *bad)
