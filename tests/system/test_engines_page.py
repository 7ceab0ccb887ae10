"""The Engines page as people have it: Airflow's own UI in a real browser, before a real cluster with a run at work."""

import json
import secrets

import httpx
import pytest

from tests.browser import chromium, errors, picture, until
from tests.chaos.scene import CONNECTION, airflow_environ
from tests.conftest import REPOSITORY
from tests.standalone import standalone

RUN_TIMEOUT_S = 600
# Five minutes of work, if nobody stops it: 128 at a time, for two seconds each.
ROWS = 20_000
BATCH = {"max_tokens": 160}
PASSWORDS = {name: secrets.token_hex(8) for name in ("admin", "looker")}


@pytest.fixture(scope="module")
def airflow(cluster, standing, tmp_path_factory):
    """An Airflow in which not everybody may do everything."""
    standing.end()
    folder = tmp_path_factory.mktemp("engines-page")
    passwords = folder / "passwords.json"
    passwords.write_text(json.dumps(PASSWORDS))
    environ = {
        **airflow_environ(RUN_TIMEOUT_S),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,looker:viewer",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
    }
    dags = [REPOSITORY / "tests" / "chaos" / "dags"]
    with standalone(folder / "home", dags, environ, ("admin", PASSWORDS["admin"])) as airflow:
        yield airflow


@pytest.fixture(scope="module")
def at_work(scene, airflow):
    """A run with an engine of its own, at work for a while; its id."""
    airflow.connect(CONNECTION, **scene.runs_on.connection())
    batch = scene.batch(scene.table(ROWS), **BATCH)
    spec = scene.spec("paged", lease={"idle_timeout": 900, "max_lifetime": 3600})
    run = airflow.trigger("chaos_with_its_own", {"engine": spec, "batch": batch})
    yield run
    airflow.wait("chaos_with_its_own", run, RUN_TIMEOUT_S)


@pytest.fixture
def driver():
    """The browser."""
    with chromium(1500, 950) as driver:
        yield driver


def log_in(driver, airflow, name):
    """Log in as somebody, and open the page from the menu's address."""
    driver.get(f"{airflow.url}/auth/login")
    until(lambda: driver.find_elements("css selector", "input[name=password]"), 60)
    driver.find_element("css selector", "input[name=username]").send_keys(name)
    driver.find_element("css selector", "input[name=password]").send_keys(PASSWORDS[name])
    driver.find_element("css selector", "button[type=submit]").click()
    until(lambda: "/auth/login" not in driver.current_url, 60)
    driver.get(f"{airflow.url}/plugin/raylm-engines")
    frame = until(lambda: driver.find_element("css selector", "iframe"), 60)
    driver.switch_to.frame(frame)
    until(lambda: "Ray LM engines" in text(driver), 60)


def card(driver):
    """Return what the page shows of the run's engine, or None; the cluster has others."""
    cards = driver.find_elements("css selector", ".engine")
    return next((one for one in cards if "paged" in one.text), None)


def button(driver):
    """Return the button that stops it."""
    return card(driver).find_element("css selector", ".danger")


def text(driver, selector="body"):
    return driver.find_element("css selector", selector).text


def rows_done(driver):
    """Return how many rows the page says are done."""
    words = text(driver, ".task .numbers")
    return int(words.split(" of ")[0].replace(",", "")) if " of " in words else 0


def test_it_is_in_airflows_menu(airflow):
    """As an external view and a mounted application, without an import error."""
    plugins = airflow.call("GET", "/plugins")["plugins"]
    (mine,) = [one for one in plugins if one["name"] == "raylm"]
    assert [view["name"] for view in mine["external_views"]] == ["Ray LM engines"]
    assert [app["url_prefix"] for app in mine["fastapi_apps"]] == ["/raylm"]
    assert airflow.call("GET", "/plugins/importErrors")["total_entries"] == 0


def test_who_is_not_logged_in_is_told_nothing(airflow):
    """By the server, whatever the page would show."""
    assert httpx.get(f"{airflow.url}/raylm/api/engines", timeout=60).status_code == 401
    body = {"conn_id": CONNECTION, "application": "raylm-x"}
    stop = httpx.post(f"{airflow.url}/raylm/api/stop", json=body, headers={"X-RayLM-Action": "stop"}, timeout=60)
    assert stop.status_code == 401


def test_who_may_only_look_follows_the_progress_and_stops_nothing(airflow, at_work, driver):
    """The engine with its owner; rows go up without reloading; the button does nothing, nor does the request."""
    log_in(driver, airflow, "looker")
    until(lambda: card(driver), 180)
    assert at_work in card(driver).find_element("css selector", ".owner").text
    # The cluster's other engine is another Airflow's, and who may not read the connection does not learn its name.
    assert "shared" not in text(driver)
    first = until(lambda: rows_done(driver), 180)
    driver.execute_script("window.marked = true")
    until(lambda: rows_done(driver) > first, 60)
    assert driver.execute_script("return window.marked") is True
    assert not button(driver).is_enabled()
    driver.find_element("css selector", ".task button").click()
    until(lambda: driver.find_elements("css selector", ".panel svg polyline"))
    picture(driver, "airflow-at-work")

    asked = """
        const [conn_id, application, done] = arguments;
        const headers = {"Content-Type": "application/json", "X-RayLM-Action": "stop"};
        fetch("api/stop", {method: "POST", headers, body: JSON.stringify({conn_id, application, on_busy: "delete"})})
          .then((answer) => done(answer.status));
    """
    application = card(driver).get_attribute("data-key")
    assert driver.execute_async_script(asked, CONNECTION, application) == 403
    assert [message for message in errors(driver) if "403" not in message] == []


def test_an_admin_stops_the_engine(airflow, at_work, scene, driver):
    """Having been asked; it is shown as stopping until it is gone, and Airflow's audit log says who did it."""
    log_in(driver, airflow, "admin")
    until(lambda: card(driver), 180)
    until(lambda: button(driver).is_enabled())
    button(driver).click()
    until(lambda: driver.find_element("id", "confirm").is_displayed())
    picture(driver, "airflow-confirm")
    if driver.find_element("id", "confirm-wait").is_displayed():
        driver.find_element("id", "confirm-wait").click()
    driver.find_element("id", "confirm-yes").click()
    until(lambda: button(driver).text == "Stopping…")
    picture(driver, "airflow-stopping")
    until(lambda: not scene.engines(), 120)
    until(lambda: card(driver) is None, 60)
    picture(driver, "airflow-stopped")

    (noted,) = airflow.call("GET", "/eventLogs?event=raylm_stop_engine")["event_logs"]
    assert (noted["owner"], noted["run_id"]) == ("admin", at_work)
    assert airflow.wait("chaos_with_its_own", at_work, RUN_TIMEOUT_S) == "failed"
