"""A real browser for tests: Chromium without a window, where it is installed."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"


@contextmanager
def chromium(width=1280, height=900):
    """Yield a browser; skip the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
    places = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in places:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(places[1]))
    driver.set_page_load_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def until(look, timeout=30.0):
    """Return what *look* returns as soon as that is true; what it raises meanwhile is no answer."""
    end = time.monotonic() + timeout
    while True:
        try:
            found, trouble = look(), None
        except Exception as error:
            found, trouble = None, error
        if found:
            return found
        if time.monotonic() >= end:
            raise AssertionError(f"not within {timeout:g} s: {trouble or found!r}")
        time.sleep(0.1)


def picture(driver, name):
    """Keep what the browser shows."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def errors(driver):
    """Return what the browser complains of: scripts that fail, or that the page's policy keeps out."""
    messages = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    # It asks for this by itself, of a server that has none.
    return [message for message in messages if "/favicon.ico" not in message]
