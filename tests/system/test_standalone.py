"""The whole thing: a real Airflow, a real Ray, a real engine, driven over REST as an operator would."""

import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from airflow_provider_raylm import local
from tests.chaos.scene import INSTALLATION
from tests.offline import ENGINE_KWARGS

RUN_TIMEOUT_S = 500
NOBODY = {"delete": [], "max_age": None}


@pytest.fixture(scope="module")
def airflow(cluster, standing):
    standing.airflow.connect("raylm_default", **cluster.connection())
    return standing.airflow


def engine_processes(cluster):
    """Return vLLM's engine processes that belong to the cluster."""
    pids = local.session(cluster.leader)
    return {pid for pid in pids if (name := Path(f"/proc/{pid}/comm")).exists() and "VLLM" in name.read_text()}


@pytest.fixture(scope="module")
def quickstart(cluster, airflow, model):
    """Run the quickstart and return (its run's id, what each task returned)."""
    folder = cluster.folder / "system"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.txt").write_text("".join(f"review number {i}\n" for i in range(40)))
    (folder / "in" / "b.txt").write_text("one\n\ntwo\n")
    conf = {
        "model": model,
        "gpus": 0,
        "engine_kwargs": ENGINE_KWARGS,
        "source": str(folder / "in"),
        "output": str(folder / "out"),
    }
    before = engine_processes(cluster)
    run = airflow.trigger("raylm_quickstart", conf)
    state = airflow.wait("raylm_quickstart", run, RUN_TIMEOUT_S)
    assert engine_processes(cluster) == before, "the torn down engine has left processes"
    states = airflow.states("raylm_quickstart", run)
    assert state == "success", (states, {t: airflow.log("raylm_quickstart", run, t)[-3000:] for t in states})
    return run, {task: airflow.xcom("raylm_quickstart", run, task) for task in states}


def test_every_dag_parses_there(airflow):
    """Without an import error."""
    assert airflow.call("GET", "/importErrors")["total_entries"] == 0


def test_three_tasks_share_one_engine(quickstart, cluster):
    """One replica was ever started; each task's counts add up; nothing is left on the cluster."""
    _, results = quickstart
    reports = [results[task] for task in ("label", "keywords", "reply")]

    assert results["deploy_reviewer"]["adopted"] is False
    assert {report["application"] for report in reports} == {results["deploy_reviewer"]["application"]}
    assert [report["rows_in"] for report in reports] == [43, 43, 43]
    assert [report["rows_written"] for report in reports] == [43, 43, 43]
    teardown = results["teardown_reviewer"]
    assert (teardown["existed"], teardown["resources_free"]) == (True, True)
    assert (teardown["usage"]["tasks"], teardown["usage"]["requests"]) == (3, 129)
    installation = results["deploy_reviewer"]["labels"]["installation"]
    assert cluster.run("sweep", {**NOBODY, "installation": installation})["engines"] == []
    replicas = (cluster.folder / "ray").glob(f"session_2*/logs/serve/replica_{teardown['application']}_engine_*.log")
    assert len(list(replicas)) == 1


def test_the_chain_keeps_rows_together(quickstart):
    """The reply stands beside the label and the text it was made from, under the same id."""
    _, results = quickstart
    label, reply = (
        ds.dataset(results[task]["output"], format="parquet").to_table().sort_by("raylm_row_id").to_pylist()
        for task in ("label", "reply")
    )

    assert [row["text"] for row in label][:2] == ["review number 0", "review number 1"]
    assert [(row["raylm_row_id"], row["text"], row["label"]) for row in reply] == [
        (row["raylm_row_id"], row["text"], row["label"]) for row in label
    ]


def test_the_task_log_is_for_people(quickstart, airflow):
    """It tells the job, the progress and the sum, and nothing of Ray's own."""
    run, _ = quickstart
    log = airflow.log("raylm_quickstart", run, "label")

    assert "submitted Ray job raylm-infer-label-" in log
    assert "43 rows, 0 failed" in log
    assert "43 rows in = 43 written + 0 quarantined + 0 already done" in log
    assert "RAYLM-RESULT" not in log
    assert "WARNING" not in log


def test_links_lead_to_job_engine_and_output(quickstart, airflow, cluster):
    """As the task's page asks for them."""
    run, results = quickstart
    links = airflow.links("raylm_quickstart", run, "label")

    assert links["Ray job"].startswith(f"{cluster.url}/#/jobs/raylm-infer-label-")
    assert links["Serve application"] == f"{cluster.url}/#/serve/applications/{results['label']['application']}"
    assert links["Output"] == results["label"]["output"]


def test_the_output_is_an_asset_with_the_figures(quickstart, airflow):
    """By the alias among the task's outlets."""
    _, results = quickstart
    (event,) = airflow.call("GET", "/assets/events?source_task_id=reply")["asset_events"]

    assert event["uri"] == f"file://{results['reply']['output']}"
    assert event["extra"]["rows_written"] == 43
    assert event["extra"]["fingerprint"] == results["reply"]["fingerprint"]


def test_the_engines_time_is_split(quickstart, airflow):
    """Over loading, idleness and the three tasks, without a rest; and the log of the teardown tells."""
    run, results = quickstart
    teardown = results["teardown_reviewer"]
    spent = teardown["spent"]

    assert set(spent["tasks"]) == {results[task]["output"] for task in ("label", "keywords", "reply")}
    assert spent["loading"] > 10
    whole = spent["loading"] + spent["idle"] + sum(spent["tasks"].values())
    assert whole == pytest.approx(teardown["engine_seconds"], abs=2)
    assert f"s of them for {results['reply']['output']}" in airflow.log("raylm_quickstart", run, "teardown_reviewer")


def test_label_and_keywords_ran_side_by_side(quickstart, airflow):
    """Neither waited for the other to end."""
    run, _ = quickstart
    times = {ti["task_id"]: (ti["start_date"], ti["end_date"]) for ti in airflow.instances("raylm_quickstart", run)}

    assert times["label"][0] < times["keywords"][1]
    assert times["keywords"][0] < times["label"][1]
    assert times["reply"][0] >= times["label"][1]


def test_the_connection_can_be_tested_over_rest(airflow, cluster):
    """As the form's button does."""
    body = {"connection_id": "x", **cluster.connection()}
    good = airflow.call("POST", "/connections/test", **body)
    bad = airflow.call("POST", "/connections/test", **{**body, "password": "wrong"})

    assert (good["status"], good["message"]) == (True, f"Ray 2.60.0 answers at {cluster.url}")
    assert bad["status"] is False
    assert "token is missing or wrong" in bad["message"]


def test_a_failed_deploy_fails_the_run_and_leaves_nothing(airflow, cluster):
    """The reason stands in the log of the task."""
    conf = {"model": "/no/such/model", "gpus": 0, "source": "/nowhere", "output": str(cluster.folder / "none")}
    run = airflow.trigger("raylm_quickstart", conf)
    started = time.monotonic()

    assert airflow.wait("raylm_quickstart", run, RUN_TIMEOUT_S) == "failed"
    assert airflow.states("raylm_quickstart", run)["label"] == "upstream_failed"
    assert time.monotonic() - started < RUN_TIMEOUT_S
    assert cluster.run("sweep", {**NOBODY, "installation": INSTALLATION})["engines"] == []


def test_the_sweep_dag_runs(airflow):
    """On a cluster without engines it finds none."""
    run = airflow.trigger("raylm_sweep_engines", {})

    assert airflow.wait("raylm_sweep_engines", run, 240) == "success"
    assert airflow.xcom("raylm_sweep_engines", run, "sweep") == {"engines": [], "deleted": []}
