"""The Engines page in a real browser, on clusters that are not there."""

import socket
import time

import pytest
from fastapi.responses import HTMLResponse

from airflow_provider_raylm.plugins import airflow_side
from airflow_provider_raylm.specs import FailedRow
from tests.browser import chromium, errors, picture, until
from tests.engines_page import HOSTILE, Cluster, page, record, served, silent, token

# As Airflow's UI frames what a plugin adds: 3.1's is the stricter one.
SANDBOX = "allow-scripts allow-same-origin allow-forms"
FRAME = f"""<!doctype html><html class="dark"><body style="margin:0">
<iframe sandbox="{SANDBOX}" src="/raylm/engines" width="1200" height="850"></iframe>"""


@pytest.fixture(scope="module")
def driver(airflow_db):
    """The browser."""
    with chromium() as driver:
        yield driver


@pytest.fixture
def show(driver, monkeypatch):
    """Serve the page with some clusters, and open it as somebody with a role."""
    monkeypatch.setattr(airflow_side, "runs_of", lambda owners: {("d", "r"): "running", ("d", "over"): "failed"})
    contexts = []

    def show(clusters, role="admin", path="/raylm/engines"):
        app = page(monkeypatch, clusters)
        app.add_api_route("/plugin/raylm-engines", lambda: HTMLResponse(FRAME))
        app.add_api_route("/dags/{rest:path}", lambda rest: HTMLResponse(f"<title>the run</title>{rest}"))
        contexts.append(served(app, free_port()))
        url = contexts[-1].__enter__()
        driver.get(f"{url}/raylm/engines.css")
        driver.delete_all_cookies()
        if role is not None:
            driver.add_cookie(
                {"name": "_token", "value": token(role), "path": "/", "httpOnly": True, "sameSite": "Lax"}
            )
        driver.get(f"{url}{path}")
        return driver

    yield show
    # A page would go on asking a server that has ended.
    driver.get("about:blank")
    errors(driver)
    for context in contexts:
        context.__exit__(None, None, None)


def free_port():
    """Return a port of loopback that nobody listens on."""
    for port in range(29000, 29100):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("all of 29000 to 29099 are taken")


def text(driver, selector="body"):
    return driver.find_element("css selector", selector).text


def click(driver, selector):
    driver.find_element("css selector", selector).click()


def records(number=30):
    began = time.time() - 10 * number
    return [
        record(
            began + 10 * at, at * at, 2000, failures={"timeout": at // 5, "invalid_output": at // 9} if at > 9 else {}
        )
        for at in range(number)
    ]


def test_progress_is_followed_without_reloading(show):
    """The same elements change; an open panel plots what the job told before the page was opened."""
    cluster = Cluster()
    ref = cluster.deploy(model="Qwen/Qwen3-8B", gpus_per_worker=1, replicas=2)
    told = records()
    name = cluster.work(ref, records=told)
    driver = show({"ray_1": cluster})
    until(lambda: "841 of 2,000 rows" in text(driver, ".task"))
    assert "5 timeout, 3 invalid_output" in text(driver, ".failures")
    assert text(driver, ".engine .badge.good") == "running"
    click(driver, ".task button")
    until(lambda: len(driver.find_elements("css selector", ".panel svg polyline")) == 3)
    driver.execute_script("document.querySelector('.task').marked = true")
    picture(driver, "light")
    cluster.say(name, record(told[-1].at + 10, 900, 2000))
    until(lambda: "900 of 2,000 rows" in text(driver, ".task"))

    assert driver.execute_script("return document.querySelector('.task').marked") is True
    assert len(driver.find_elements("css selector", ".panel svg polyline")) == 3
    assert errors(driver) == []


def test_hostile_text_is_text(show):
    """Wherever it stands: nothing of it runs, becomes an element, or leads anywhere but into Airflow."""
    cluster = Cluster()
    ref = cluster.deploy(engine=HOSTILE, dag_id=HOSTILE, run_id=f"javascript:{HOSTILE}", model=HOSTILE)
    cluster.work(
        ref,
        HOSTILE,
        [
            record(time.time() - 10, 5, failures={HOSTILE: 3}),
            record(
                time.time(),
                9,
                failures={HOSTILE: 3},
                failed_rows=[FailedRow(row_id=HOSTILE, reason=HOSTILE, message=HOSTILE)] * 3,
            ),
        ],
    )
    bad = silent()
    bad.error.args = (HOSTILE,)
    driver = show({"ray_1": cluster, "ray_2": bad})
    until(lambda: HOSTILE[:20] in text(driver, ".model"))
    click(driver, ".task button")
    until(lambda: driver.find_elements("css selector", ".panel svg polyline"))
    until(lambda: len(driver.find_elements("css selector", ".failed-rows td")) == 9)
    click(driver, ".engine .danger")
    until(lambda: driver.find_element("id", "confirm").is_displayed())
    time.sleep(0.5)

    assert driver.title == "Ray LM engines"
    assert not driver.find_elements("css selector", "img, body script")
    links = driver.execute_script("return Array.from(document.querySelectorAll('a[href]'), (one) => one.href)")
    assert links
    assert all(link.startswith(("http://127.0.0.1:", "http://fake-ray:8265/")) for link in links)
    for place in (".model", ".failed-rows td", ".failed-rows td + td", ".failed-rows td:last-child"):
        assert driver.find_element("css selector", place).get_attribute("textContent") == HOSTILE
    assert errors(driver) == []


def test_the_first_failed_rows_are_in_the_details(show):
    """With what was said of each, where that is no row's; they stay as they are while there is no news of them."""
    cluster = Cluster()
    ref = cluster.deploy()
    rows = [
        FailedRow(row_id="00000-000000004", reason="null_value", message="column 'text' is null"),
        FailedRow(row_id="00000-000000007", reason="invalid_request"),
    ]
    more = {"failures": {"null_value": 900, "invalid_request": 1}, "failed_rows": rows}
    name = cluster.work(ref, records=[record(time.time() - 10, 950, 2000, **more)])
    driver = show({"ray_1": cluster})
    until(lambda: driver.find_elements("css selector", ".task button"))
    assert not driver.find_element("css selector", ".failed-rows").is_displayed()
    click(driver, ".task button")
    until(lambda: "The first 2 of 901 failed rows" in text(driver, ".failed-rows"))
    picture(driver, "failed-rows")
    assert "00000-000000004 null_value column 'text' is null" in text(driver, ".failed-rows")
    assert "00000-000000007 invalid_request may quote the row" in text(driver, ".failed-rows")
    assert "raylm quarantine PATH" in text(driver, ".failed-rows")
    driver.execute_script("document.querySelector('.failed-rows table').marked = true")
    cluster.say(name, record(time.time(), 960, 2000, **more))
    until(lambda: "960 of 2,000 rows" in text(driver, ".task"))
    assert driver.execute_script("return document.querySelector('.failed-rows table').marked") is True
    click(driver, ".task button")
    assert not driver.find_element("css selector", ".failed-rows").is_displayed()


def test_two_hundred_engines(show):
    """With long names they are drawn within seconds, do not widen the page, and can be filtered."""
    cluster = Cluster()
    for number in range(200):
        long = f"{'very_long_name_' * 12}{number}"
        ref = cluster.deploy(engine=f"e{number}", dag_id="d", run_id="r" if number % 9 else "over", model=long)
        cluster.work(ref, long, [record(time.time(), 5)])
    driver = show({"ray_1": cluster})
    until(lambda: len(driver.find_elements("css selector", ".engine")) == 200)
    until(lambda: "40 of" not in text(driver, "#summary") and "200 engines" in text(driver, "#summary"))
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(wide) == 0
    draws = "const at = performance.now(); draw(); return performance.now() - at"
    assert driver.execute_script(draws) < 1000
    assert len(driver.find_elements("css selector", ".engine.alarm")) == 23
    first = driver.find_element("css selector", ".engine")
    assert "alarm" in first.get_attribute("class")
    assert "its run is over (failed)" in first.text
    picture(driver, "two-hundred")
    driver.find_element("id", "filter").send_keys("e199")
    until(lambda: len(driver.find_elements("css selector", ".engine")) == 1)


def test_stopping_asks_first(show):
    """In Airflow's frame, which lets no page open a dialog of the browser's; then the engine is gone."""
    cluster = Cluster()
    ref = cluster.deploy()
    cluster.work(ref, records=records(3))
    driver = show({"ray_1": cluster}, path="/plugin/raylm-engines")
    driver.switch_to.frame(0)
    until(lambda: "reviewer" in text(driver, ".engine"))
    click(driver, ".engine .danger")
    until(lambda: "1 task works on it" in text(driver, "#confirm"))
    picture(driver, "confirm")
    click(driver, "#confirm-no")
    assert len(cluster.engines) == 1
    click(driver, ".engine .danger")
    click(driver, "#confirm-yes")
    until(lambda: not cluster.engines)
    until(lambda: "No engine is up on this cluster" in text(driver))

    (request,) = [one for one in cluster.submitted if one.verb == "teardown"]
    assert request.payload["on_busy"] == "wait"
    assert errors(driver) == []


def test_a_stop_waits_unless_told_otherwise(show):
    """Also for tasks that the page has not seen yet; and what was said of one engine is not said of the next."""
    cluster = Cluster()
    cluster.deploy("first")
    cluster.deploy("second")
    driver = show({"ray_1": cluster})
    until(lambda: len(driver.find_elements("css selector", ".engine")) == 2)
    for left, wait in ((1, False), (0, True)):
        click(driver, ".engine .danger")
        if not wait:
            click(driver, "#confirm-wait")
        click(driver, "#confirm-yes")
        until(lambda left=left: len(driver.find_elements("css selector", ".engine")) == left)

    asked = [one.payload["on_busy"] for one in cluster.submitted if one.verb == "teardown"]
    assert asked == ["delete", "wait"]


def test_the_keyboards_focus_stays(show):
    """While an engine before it goes, and progress comes; each button says what it does, and to what."""
    cluster = Cluster()
    first, second = cluster.deploy("first"), cluster.deploy("second")
    name = cluster.work(second, records=records(3))
    driver = show({"ray_1": cluster})
    until(lambda: driver.find_elements("css selector", ".task"))
    labels = [one.accessible_name for one in driver.find_elements("css selector", ".engine button")]
    assert labels == ["Stop first of d", "Stop second of d", "Details of label"]
    assert driver.find_element("css selector", "progress").accessible_name == "Rows done of label"
    click(driver, ".task button")
    until(lambda: driver.find_elements("css selector", ".panel svg polyline"))
    driver.execute_script("document.querySelector('.panel .job').focus()")
    del cluster._engines[first.application]
    cluster.say(name, record(time.time() + 1, 77, 2000))
    until(lambda: "77 of 2,000 rows" in text(driver) and "first" not in text(driver, "#connections"))
    until(lambda: "77" in driver.execute_script("return JSON.stringify(answer)"))
    time.sleep(0.5)

    assert driver.execute_script("return document.activeElement.className") == "job"


def test_who_is_logged_out_meanwhile_is_told_and_sees_nothing_more(show):
    """And may log in by the keyboard: the link is not replaced with every poll."""
    cluster = Cluster()
    cluster.deploy()
    driver = show({"ray_1": cluster})
    until(lambda: "1 engine" in text(driver, "#summary"))
    driver.delete_all_cookies()
    until(lambda: "You are logged out" in text(driver, "#notice"))
    driver.execute_script("document.querySelector('#notice a').focus()")
    driver.execute_script("poll()")
    time.sleep(0.5)

    assert text(driver, "#summary") == ""
    assert not driver.find_elements("css selector", ".engine")
    assert driver.execute_script("return document.activeElement.textContent") == "Log in"


def test_a_stop_that_is_under_way_is_shown(show):
    """By anybody's page, until the engine is gone."""
    cluster = Cluster()
    ref = cluster.deploy()
    job = cluster.work(ref)
    cluster._jobs[f"raylm-teardown-x-{ref.application}"] = cluster._jobs.pop(job)
    driver = show({"ray_1": cluster})
    until(lambda: text(driver, ".engine .danger") == "Stopping…")
    assert not driver.find_element("css selector", ".engine .danger").is_enabled()


def test_links_lead_out_of_airflows_frame(show):
    """To the run, in the window around it; and the frame's dark theme is the page's."""
    cluster = Cluster()
    cluster.deploy()
    driver = show({"ray_1": cluster}, path="/plugin/raylm-engines")
    driver.switch_to.frame(0)
    until(lambda: driver.find_elements("css selector", ".owner a"))
    assert driver.execute_script("return document.documentElement.classList.contains('dark')")
    picture(driver, "dark")
    click(driver, ".owner a:last-child")
    driver.switch_to.default_content()
    until(lambda: driver.title == "the run")
    assert driver.current_url.endswith("/dags/d/runs/r")


def test_what_leads_nowhere_is_no_link(show):
    """Of a run that is deleted, in Airflow's frame: a click leaves everything where it is."""
    cluster = Cluster()
    cluster.deploy(run_id="deleted")
    driver = show({"ray_1": cluster}, path="/plugin/raylm-engines")
    driver.switch_to.frame(0)
    until(lambda: "its run is deleted" in text(driver, ".engine"))
    driver.execute_script("window.parent.marked = true")
    colours = "return ['.owner a', '.owner'].map((one) => getComputedStyle(document.querySelector(one)).color)"
    link, plain = driver.execute_script(colours)
    click(driver, ".owner a:last-child")
    time.sleep(1)

    assert link == plain
    assert driver.execute_script("return window.parent.marked") is True


@pytest.mark.parametrize(
    ("role", "clusters", "says"),
    [
        (None, {}, "You are logged out"),
        ("", {}, "You may not see the engines"),
        ("admin", {}, "No connection to a Ray cluster"),
        ("admin", {"ray_1": Cluster()}, "No engine is up on this cluster"),
        ("admin", {"ray_1": silent()}, "The cluster does not answer."),
    ],
    ids=["logged out", "forbidden", "no connection", "no engine", "silent"],
)
def test_what_is_missing_is_said(request, show, role, clusters, says):
    """And no more than that."""
    driver = show(clusters, role)
    until(lambda: says in text(driver))
    picture(driver, request.node.callspec.id.replace(" ", "-"))
    assert not driver.find_elements("css selector", ".engine")


def test_who_may_not_stop_has_no_button_that_works(show):
    """And is told why; a role that may only look sees all the rest."""
    cluster = Cluster()
    cluster.deploy()
    driver = show({"ray_1": cluster}, "viewer")
    until(lambda: "reviewer" in text(driver, ".engine"))
    button = driver.find_element("css selector", ".engine .danger")
    assert not button.is_enabled()
    assert "may not change runs" in button.get_attribute("title")
