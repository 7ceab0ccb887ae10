"""The Engines page: what it shows to whom, how little it asks of clusters, and how an engine is stopped."""

# ruff: noqa: AIR311, TID251 - the database's own classes

import asyncio
import threading
import time
import tomllib
from datetime import UTC, datetime

import pytest
from airflow.models import Connection, DagRun, Log
from airflow.utils.session import create_session
from fastapi.testclient import TestClient
from sqlalchemy import delete, select

from airflow_provider_raylm.errors import ClusterError
from airflow_provider_raylm.plugins import airflow_side, watching
from airflow_provider_raylm.plugins.api import connect
from airflow_provider_raylm.plugins.raylm import URL_PREFIX, RayLMPlugin
from airflow_provider_raylm.polling import JobInfo, Refused
from airflow_provider_raylm.specs import FailedRow, Labels
from airflow_provider_raylm.specs.engine import COMMAND_RUN
from tests.conftest import REPOSITORY
from tests.engines_page import HOSTILE, Cluster, page, record, silent, token

FROM_THE_PAGE = {"X-RayLM-Action": "stop", "Sec-Fetch-Site": "same-origin"}
ALIVE = {("d", "r"): "running"}


@pytest.fixture(autouse=True)
def runs(airflow_db, monkeypatch):
    """The runs that Airflow knows."""
    known = dict(ALIVE)
    monkeypatch.setattr(airflow_side, "runs_of", lambda owners: known)
    return known


@pytest.fixture
def viewer(monkeypatch):
    """Make a browser of somebody, with the role he has, on a page with some clusters."""

    def make(clusters, role="admin"):
        app = page(monkeypatch, clusters)
        return TestClient(app, cookies={} if role is None else {"_token": token(role)})

    return make


def listed(browser):
    answer = browser.get("/raylm/api/engines")
    assert answer.status_code == 200, answer.text
    return {one["conn_id"]: one for one in answer.json()["connections"]}


def stop(browser, application, conn_id="ray_1", headers=FROM_THE_PAGE, **more):
    body = {"conn_id": conn_id, "application": application, **more}
    return browser.post("/raylm/api/stop", json=body, headers=headers)


def test_an_engine_with_all_that_is_known_of_it(viewer, monkeypatch):
    """Owner, model, replicas, age, lease, tasks with progress, rates, time left and failures, GPU time and money."""
    cluster = Cluster()
    ref = cluster.deploy(model="org/model", gpus_per_worker=1, tensor_parallel_size=2, replicas=3)
    now = time.time()
    records = [
        record(now - 100 + at, at // 2, failures={"timeout": at // 20} if at >= 20 else {})
        for at in (0, 40, 60, 80, 100)
    ]
    job = cluster.work(ref, records=records)
    browser = viewer({"ray_1": cluster})
    monkeypatch.setenv(
        "AIRFLOW_CONN_RAY_1", '{"conn_type": "raylm", "host": "ray-head", "extra": {"price_per_gpu_hour": 3600}}'
    )
    (engine,) = listed(browser)["ray_1"]["engines"]

    assert (engine["name"], engine["dag_id"], engine["run_id"], engine["owner"]) == ("reviewer", "d", "r", "alive")
    assert (engine["model"], engine["status"], engine["stopping"]) == ("org/model", "RUNNING", False)
    assert (engine["replicas_running"], engine["replicas_wanted"], engine["gpus"]) == (3, 3, 6)
    assert 0 <= engine["age"] < 20
    assert engine["gpu_seconds"] == pytest.approx(6 * engine["age"])
    assert engine["cost"] == pytest.approx(engine["gpu_seconds"])
    assert (engine["lease_bound"], engine["lease_left"]) == ("idle_timeout", pytest.approx(1800, abs=1))
    (task,) = engine["tasks"]
    assert (task["job"], task["task_id"], task["map_index"]) == (job, "label", None)
    assert (task["rows"], task["total"], task["failures"]) == (50, 100, {"timeout": 5})
    assert (task["rows_per_s"], task["tokens_per_s"]) == (pytest.approx(0.5), pytest.approx(2))
    assert task["seconds_left"] == pytest.approx(100)


def test_a_tasks_history_is_there_at_once(viewer):
    """From the end of its log; later looks add to it, and nothing twice."""
    cluster = Cluster()
    name = cluster.work(cluster.deploy(), records=[record(at, at) for at in (10, 20, 30)])
    browser = viewer({"ray_1": cluster})
    listed(browser)
    ask = {"conn_id": "ray_1", "job": name}
    assert [one["rows"] for one in browser.get("/raylm/api/job", params=ask).json()["history"]] == [10, 20, 30]

    cluster.say(name, record(40, 40))
    browser.app.routes[-1].app.state.watch.cluster("ray_1").expire()
    assert [one["rows"] for one in browser.get("/raylm/api/job", params=ask).json()["history"]] == [10, 20, 30, 40]
    assert browser.get("/raylm/api/job", params={**ask, "job": "no-such"}).status_code == 404


def test_a_connection_that_is_deleted_meanwhile(monkeypatch):
    """While one viewer waits for its cluster, another's answer has it no more: the first one's is whole."""
    monkeypatch.setattr(watching, "ANSWER_S", 0.1)
    cluster, watch = Cluster(), watching.Watch()
    cluster.slow = threading.Event()

    async def looked():
        looks = asyncio.create_task(watch.looks({"ray_1": lambda: cluster}))
        await asyncio.sleep(0)
        watch.keep([])
        return await looks

    try:
        assert asyncio.run(looked())["ray_1"].state == "looking"
    finally:
        cluster.slow.set()


@pytest.mark.parametrize("odd", ['"at": NaN', '"at": 1e999', '"rows": -1', f'"rows": 1{400 * "0"}', '"total": -5'])
def test_an_odd_line_in_one_log_hides_no_engine(viewer, odd):
    """It is no record: numbers that nobody can count with are nobody's progress."""
    cluster = Cluster()
    name = cluster.work(cluster.deploy(), records=[record(90, 5)])
    job, log = cluster._jobs[name]
    cluster._jobs[name] = (job, f"{log}raylm - progress: {{{odd}}}\n")
    (engine,) = listed(viewer({"ray_1": cluster}))["ray_1"]["engines"]

    assert engine["tasks"][0]["rows"] == 5


def test_the_first_failed_rows_come_with_the_last_record(viewer):
    """Not with the list that everybody polls, nor with each of 240 records."""
    cluster = Cluster()
    rows = [FailedRow(row_id=f"row-{number}", reason="timeout", message="late") for number in range(3)]
    told = [record(at, at, failures={"timeout": at}, failed_rows=rows[:at]) for at in (1, 2, 3)]
    name = cluster.work(cluster.deploy(), records=told)
    browser = viewer({"ray_1": cluster})
    assert "row-0" not in browser.get("/raylm/api/engines").text
    history = browser.get("/raylm/api/job", params={"conn_id": "ray_1", "job": name}).json()["history"]

    assert [len(one["failed_rows"]) for one in history] == [0, 0, 3]
    assert history[-1]["failed_rows"][0] == {"row_id": "row-0", "reason": "timeout", "message": "late"}


def test_a_silent_cluster_slows_nobody(viewer, monkeypatch):
    """It is said to be silent; the engines of the others are there, and the earlier ones stay."""
    monkeypatch.setattr(watching, "ANSWER_S", 0.3)
    slow, good = Cluster(), Cluster()
    good.deploy()
    slow.slow = threading.Event()
    browser = viewer({"ray_1": good, "ray_2": slow, "ray_3": silent(), "ray_4": Cluster(Refused("No token."))})
    began = time.monotonic()
    found = listed(browser)
    assert time.monotonic() - began < 5
    slow.slow.set()

    assert {name: one["state"] for name, one in found.items()} == {
        "ray_1": "ok",
        "ray_2": "looking",
        "ray_3": "silent",
        "ray_4": "refused",
    }
    assert len(found["ray_1"]["engines"]) == 1
    assert "http://ray-9:8265 does not answer" in found["ray_3"]["trouble"]
    good.error = silent().error
    browser.app.routes[-1].app.state.watch.cluster("ray_1").expire()
    after = listed(browser)["ray_1"]
    assert (after["state"], len(after["engines"])) == ("silent", 1)
    assert after["seen_at"] is not None


def test_a_hundred_viewers_are_one_to_a_dashboard(viewer, monkeypatch):
    """They share a look; a silent cluster is asked less and less often."""
    monkeypatch.setattr(watching, "KEPT_S", 60.0)
    cluster, quiet = Cluster(), silent()
    cluster.work(cluster.deploy(), records=[record(10, 10)])
    browser = viewer({"ray_1": cluster, "ray_2": quiet})
    cluster.asked["engines"] = 0
    for _ in range(100):
        assert listed(browser)["ray_1"]["state"] == "ok"

    assert cluster.asked == {"engines": 1, "jobs": 1, "logs": 1}
    assert quiet.asked["engines"] <= 2


def test_a_look_reads_a_bounded_number_of_logs(monkeypatch):
    """Those that were read longest ago; after some looks all have been read."""
    monkeypatch.setattr(watching, "TAILS", 10)
    cluster = Cluster()
    ref = cluster.deploy()
    for number in range(25):
        cluster.work(ref, f"t{number}", [record(10, number)])
    seen = watching.Cluster()
    counts = []
    for _ in range(3):
        seen.expire()
        seen.look(lambda: cluster).result(10)
        counts.append((cluster.asked["logs"], sum(bool(one) for one in seen.seen.histories.values())))

    assert counts == [(10, 10), (20, 20), (30, 25)]


def test_a_long_list_of_jobs_is_asked_for_seldom(monkeypatch):
    """Ray has no shorter one: what takes a second is asked for every ten."""
    cluster = Cluster()
    ask = cluster.all_jobs

    def slowly():
        time.sleep(0.2)
        return ask()

    monkeypatch.setattr(cluster, "all_jobs", slowly)
    monkeypatch.setattr(watching, "KEPT_S", 0.0)
    seen = watching.Cluster()
    for _ in range(3):
        seen.look(lambda: cluster).result(10)
    assert (cluster.asked["engines"], cluster.asked["jobs"]) == (3, 1)


@pytest.mark.parametrize(
    ("state", "owner"),
    [("running", "alive"), ("queued", "alive"), ("failed", "over"), ("success", "over"), (None, "gone")],
)
def test_an_engine_whose_run_is_over_stands_out(viewer, runs, state, owner):
    """It comes first."""
    cluster = Cluster()
    cluster.deploy(engine="other", run_id="lives")
    cluster.deploy()
    runs[("d", "lives")] = "running"
    runs.pop(("d", "r"))
    if state is not None:
        runs[("d", "r")] = state
    engines = listed(viewer({"ray_1": cluster}))["ray_1"]["engines"]
    (mine,) = [one for one in engines if one["run_id"] == "r"]

    assert (mine["owner"], mine["run_state"]) == (owner, state)
    assert owner == "alive" or engines[0] is mine


def test_an_engine_that_a_command_has_deployed_for_itself(viewer):
    """Is nobody's that was forgotten: a preview is at work on it, which holds its lease."""
    cluster = Cluster()
    ref = cluster.deploy(run_id=f"{COMMAND_RUN}0a1b2c", lease={"idle_timeout": 600})
    job = cluster.work(ref)
    cluster._jobs["raylm-preview-cli-1"] = cluster._jobs.pop(job)
    (engine,) = listed(viewer({"ray_1": cluster}))["ray_1"]["engines"]

    assert (engine["owner"], engine["dag_id"], engine["may_stop"]) == ("command", "d", True)
    assert engine["lease_left"] == 600


def test_another_airflows_engine(viewer):
    """It is shown as such, with nothing to stop it by; who may not read the connection is told no name of it."""
    cluster = Cluster()
    ref = cluster.deploy(installation="elsewhere")
    cluster.work(ref)
    browser = viewer({"ray_1": cluster})
    (engine,) = listed(browser)["ray_1"]["engines"]
    assert (engine["owner"], engine["dag_id"], engine["may_stop"]) == ("elsewhere", "d", False)
    assert stop(browser, ref.application).status_code == 403
    assert "teardown" not in {request.verb for request in cluster.submitted}

    (engine,) = listed(viewer({"ray_1": cluster}, "viewer"))["ray_1"]["engines"]
    assert (engine["owner"], engine["application"], engine["dag_id"]) == ("hidden", "", None)
    assert engine["tasks"][0]["task_id"] is None


def test_a_dag_that_one_may_not_read_has_no_name(viewer, monkeypatch):
    """The engine and what it costs are there; its progress cannot be asked for."""
    cluster = Cluster()
    name = cluster.work(cluster.deploy(), records=[record(10, 10)])
    browser = viewer({"ray_1": cluster})
    monkeypatch.setattr(airflow_side, "may_with_runs", lambda user, method, dag_id: False)
    answer = browser.get("/raylm/api/engines")
    (engine,) = answer.json()["connections"][0]["engines"]

    assert (engine["owner"], engine["run_id"], engine["may_stop"]) == ("hidden", None, False)
    assert '"reviewer"' not in answer.text
    assert name not in answer.text
    assert browser.get("/raylm/api/job", params={"conn_id": "ray_1", "job": name}).status_code == 404


def test_a_task_of_a_dag_that_one_may_not_read_has_no_name(viewer, monkeypatch):
    """On an engine that another DAG has lent it."""
    cluster = Cluster()
    ref = cluster.deploy()
    name = cluster.work(ref, "borrowing", [record(10, 10, failures={"timeout": 3})], dag_id="secret")
    browser = viewer({"ray_1": cluster})
    (task,) = listed(browser)["ray_1"]["engines"][0]["tasks"]
    assert (task["dag_id"], task["task_id"], task["failures"]) == ("secret", "borrowing", {"timeout": 3})
    monkeypatch.setattr(airflow_side, "may_with_runs", lambda user, method, dag_id: dag_id != "secret")
    (task,) = listed(browser)["ray_1"]["engines"][0]["tasks"]

    assert (task["dag_id"], task["task_id"], task["job"], task["rows"]) == (None, None, "", 10)
    assert task["failures"] == {"failed": 3}
    assert browser.get("/raylm/api/job", params={"conn_id": "ray_1", "job": name}).status_code == 404


def test_nobody_who_is_not_logged_in_sees_anything(viewer):
    """Nor does one whose role says nothing; the page's own files hold no data."""
    cluster = Cluster()
    cluster.deploy()
    stranger = viewer({"ray_1": cluster}, role=None)
    for answer in (stranger.get("/raylm/api/engines"), stop(stranger, "raylm-x")):
        assert answer.status_code == 401
    assert stranger.get("/raylm/engines").status_code == 200
    assert viewer({"ray_1": cluster}, role="").get("/raylm/api/engines").status_code == 403


def test_no_secret_is_in_an_answer(viewer):
    """Who may not read the connection is not told its address either."""
    cluster = Cluster()
    for role, told in (("admin", "http://fake-ray:8265"), ("viewer", "")):
        answer = viewer({"ray_1": cluster, "ray_2": silent()}, role).get("/raylm/api/engines")
        assert "s3cr3t" not in answer.text
        connections = {one["conn_id"]: one for one in answer.json()["connections"]}
        assert connections["ray_1"]["dashboard_url"] == told
        assert ("ray-9" in connections["ray_2"]["trouble"]) == (role == "admin")


def test_stopping_submits_the_teardown_once(viewer):
    """However often it is asked; the page shows it while the job is at work, and Airflow's audit log who did it."""
    cluster = Cluster()
    ref = cluster.deploy()
    cluster.pend(watching_task(), looks=100)
    browser = viewer({"ray_1": cluster})
    first, second = stop(browser, ref.application), stop(browser, ref.application)

    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()
    (request,) = [one for one in cluster.submitted if one.verb == "teardown"]
    assert request.submission_id == first.json()["job"]
    assert request.payload == {"application": ref.application, "on_busy": "wait", "drain_timeout": 600.0}
    assert listed(browser)["ray_1"]["engines"][0]["stopping"] is True
    with create_session() as session:
        noted = session.scalars(select(Log).where(Log.event == "raylm_stop_engine")).all()
        assert {(one.owner, one.dag_id, one.run_id) for one in noted} == {("somebody", "d", "r")}


def test_a_stopped_engine_is_gone(viewer):
    """As after its DAG's own teardown."""
    cluster = Cluster()
    ref = cluster.deploy()
    browser = viewer({"ray_1": cluster})
    assert stop(browser, ref.application, on_busy="delete").status_code == 200

    assert cluster.engines == {}
    assert listed(browser)["ray_1"]["engines"] == []
    assert stop(browser, ref.application).status_code == 404
    assert stop(browser, ref.application, on_busy="perhaps").status_code == 422


@pytest.mark.parametrize(("role", "status"), [("viewer", 403), ("user", 200), ("op", 200), ("admin", 200)])
def test_stopping_takes_the_permission_to_change_the_dags_runs(viewer, role, status):
    """Who may only look sees a button that does nothing, and is refused when he asks."""
    cluster = Cluster()
    ref = cluster.deploy()
    browser = viewer({"ray_1": cluster}, role)

    assert listed(browser)["ray_1"]["engines"][0]["may_stop"] == (status == 200)
    assert stop(browser, ref.application).status_code == status
    assert (cluster.engines == {}) == (status == 200)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin"},
        *({"X-RayLM-Action": "stop", "Sec-Fetch-Site": site} for site in ("cross-site", "same-site", "none")),
    ],
)
def test_another_site_stops_nothing(viewer, headers):
    """With the cookie of somebody who may."""
    cluster = Cluster()
    ref = cluster.deploy()
    assert stop(viewer({"ray_1": cluster}), ref.application, headers=headers).status_code == 403
    assert len(cluster.engines) == 1


def test_a_stop_that_does_not_get_through(viewer, monkeypatch):
    """Says so, at once, and that it may be tried again."""
    cluster = Cluster()
    ref = cluster.deploy()
    browser = viewer({"ray_1": cluster})
    listed(browser)
    monkeypatch.setattr(cluster, "get", lambda submission_id: (_ for _ in ()).throw(silent().error))
    began = time.monotonic()
    answer = stop(browser, ref.application)

    assert (answer.status_code, time.monotonic() - began < 5) == (502, True)
    assert "Try again" in answer.json()["detail"]


def test_two_hundred_engines_with_hostile_names(viewer, runs):
    """Each is there, as text; the answer is quick."""
    cluster = Cluster()
    for number in range(200):
        ref = cluster.deploy(engine=f"{HOSTILE}{number}", dag_id=HOSTILE, run_id=f"r{number}", model=HOSTILE)
        cluster.work(ref, HOSTILE, [record(10, 5, failures={HOSTILE: 3})])
    browser = viewer({"ray_1": cluster})
    listed(browser)
    began = time.monotonic()
    engines = listed(browser)["ray_1"]["engines"]

    assert time.monotonic() - began < 5
    assert len(engines) == 200
    assert {one["model"] for one in engines} == {HOSTILE}
    assert browser.get("/raylm/api/engines").headers["content-type"] == "application/json"


def test_no_answer_lets_a_script_in(viewer):
    """By policy; the page's files have none of their own beside the one that is named."""
    browser = viewer({})
    for path in ("engines", "engines.js", "engines.css", "api/engines"):
        answer = browser.get(f"/raylm/{path}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'self'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    html = browser.get("/raylm/engines").text
    assert html.count("<script") == html.count('<script src="engines.js" defer></script>') == 1
    assert "style=" not in html
    script = browser.get("/raylm/engines.js").text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script


def test_a_connection_that_cannot_work_says_why(monkeypatch, airflow_db):
    """One with a bad extra beside one that is fine; nothing of the extra is shown."""
    app = page(monkeypatch, {})
    monkeypatch.undo()
    monkeypatch.setattr(airflow_side, "runs_of", lambda owners: {})
    monkeypatch.setenv("AIRFLOW_CONN_RAY_BAD", '{"conn_type": "raylm", "host": "h", "extra": {"pazzword": "s3cr3t"}}')
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", "http://raylm.example")
    found = listed(TestClient(app, cookies={"_token": token()}))

    assert set(found) == {"ray_bad"}
    assert found["ray_bad"]["state"] == "broken"
    assert "pazzword" in found["ray_bad"]["trouble"]
    assert "s3cr3t" not in found["ray_bad"]["trouble"]


def test_connections_of_the_database(monkeypatch, airflow_db):
    """Those of this type; one that cannot be decrypted is in nobody's way, and the environment's goes first."""
    monkeypatch.setattr(airflow_side, "runs_of", lambda owners: {})
    monkeypatch.setattr(watching, "REQUEST_S", 1.0)
    stored = [
        Connection(conn_id="page_good", conn_type="raylm", host="127.0.0.1", port=9, password="s3cr3t"),
        Connection(conn_id="page_bad", conn_type="raylm", host="127.0.0.1", port=9),
        Connection(conn_id="page_other", conn_type="http", host="127.0.0.1", port=9),
    ]
    monkeypatch.setenv("AIRFLOW_CONN_PAGE_GOOD", "raylm://127.0.0.2:9")
    with create_session() as session:
        session.add_all(stored)
        session.flush()
        stored[1]._password, stored[1].is_encrypted = "no token", True
    try:
        assert set(airflow_side.connections()) == {"page_good", "page_bad"}
        assert airflow_side.connections()["page_good"].host == "127.0.0.2"
        bad = airflow_side.connections()["page_bad"]
        assert bad.unreadable
        with pytest.raises(ClusterError, match=r"page_bad' cannot be decrypted: \[core\] fernet_key"):
            connect(bad)
    finally:
        with create_session() as session:
            session.execute(delete(Connection).where(Connection.conn_id.like("page_%")))


def test_what_airflow_knows_of_a_run(airflow_db, monkeypatch):
    """Its state, of the one that is asked for alone."""
    monkeypatch.undo()
    labels = Labels(installation="tests", dag_id="page_d", run_id="page_r", engine="e")
    with create_session() as session:
        now = datetime.now(UTC)
        for run_id, state in (("page_r", "running"), ("page_s", "failed")):
            session.add(
                DagRun(dag_id="page_d", run_id=run_id, run_type="manual", state=state, run_after=now, logical_date=None)
            )
    try:
        assert airflow_side.runs_of([labels]) == {("page_d", "page_r"): "running"}
        assert airflow_side.runs_of([labels.model_copy(update={"run_id": "no"})]) == airflow_side.runs_of([]) == {}
    finally:
        with create_session() as session:
            session.execute(delete(DagRun).where(DagRun.dag_id == "page_d"))


def test_a_waiting_and_an_ended_task(viewer):
    """One that waits to start says why; one that has ended is not at work, and the idle time counts from its end."""
    cluster = Cluster()
    ref = cluster.deploy()
    done = cluster.work(ref, "done")
    cluster.finish(done)
    browser = viewer({"ray_1": cluster})
    (engine,) = listed(browser)["ray_1"]["engines"]
    assert engine["tasks"] == []
    assert engine["lease_left"] <= 1800

    waiting = cluster.work(ref, "later", status="PENDING")
    cluster._jobs[waiting] = (JobInfo("PENDING", "No room.", cluster.get(waiting).metadata, time.time(), False), "")
    browser.app.routes[-1].app.state.watch.cluster("ray_1").expire()
    (task,) = listed(browser)["ray_1"]["engines"][0]["tasks"]
    assert (task["status"], task["message"], task["rows"]) == ("PENDING", "No room.", None)


def test_the_plugin_is_in_the_menu():
    """By its entry point, at a relative address, so that it works below any path."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["airflow.plugins"] == {"raylm": "airflow_provider_raylm.plugins.raylm:RayLMPlugin"}
    (view,) = RayLMPlugin.external_views
    (app,) = RayLMPlugin.fastapi_apps
    assert (view["name"], view["destination"]) == ("Ray LM engines", "nav")
    assert f"/{view['href']}" == f"{URL_PREFIX}/engines"
    assert app["url_prefix"] == URL_PREFIX
    with TestClient(app["app"]) as client:
        assert client.get("/engines").status_code == 200


def watching_task():
    from airflow_provider_raylm.plugins.stopping import TASK

    return TASK
