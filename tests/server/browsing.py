"""The distribution's Chromium without a screen, and a page in it as its reader meets it."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.clients import until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# Without a sandbox, which wants another user than root, and without business of Chromium's own on
# the network: what a page asks for is all that is asked, and there is no host but this one.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --no-proxy-server
--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage
""".split()
ONE_HOST = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
BACKSPACE, ENTER, ESCAPE, SHIFT, TAB = "\ue003", "\ue007", "\ue00c", "\ue008", "\ue004"


@contextlib.contextmanager
def chromium(folder: Path) -> "Iterator[Chrome]":
    """A browser with an empty profile in `folder`. Skips the test where something is missing;
    nothing is downloaded.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in paths.items():
        if path is None:
            pytest.skip(f"{name} is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in (*FLAGS, ONE_HOST, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(paths["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The chat page of a server at `base`, opened anew."""

    def __init__(self, browser: "Chrome", base: str) -> None:
        self.browser, self.base = browser, base
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(base)

    def run(self, script: str, *args: object) -> Any:
        """What an async function with this body returns; `args` are its arguments `a`."""
        code = "const a = [...arguments], done = a.pop();"
        code += f"(async () => {{ {script} }})().then(done, (error) => done(String(error)));"
        return self.browser.execute_async_script(code, *args)

    def text(self, selector: str) -> str:
        """Of the last element of this kind; empty if there is none, or none that is seen."""
        return self.run(
            "const found = [...document.querySelectorAll(a[0])].pop();"
            "return found?.checkVisibility() ? found.textContent.trim() : '';",
            selector,
        )

    def count(self, selector: str) -> int:
        """Elements, seen or not."""
        return self.run("return document.querySelectorAll(a[0]).length;", selector)

    def value(self, selector: str) -> str:
        """Of a field."""
        return self.run("return document.querySelector(a[0]).value;", selector)

    def shows(self, selector: str) -> bool:
        """Whether an element is seen."""
        return self.run("return document.querySelector(a[0]).checkVisibility();", selector)

    def type(self, selector: str, *keys: str) -> None:
        """Keys pressed in a field."""
        self.browser.find_element("css selector", selector).send_keys(*keys)

    def press(self, *keys: str) -> None:
        """Keys pressed wherever the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def click(self, selector: str) -> None:
        """On what can be seen there."""
        self.browser.find_element("css selector", selector).click()

    def answer(self, text: str) -> str:
        """The whole answer to a message."""
        before = self.count("article")
        self.type("#question", text, ENTER)
        until(lambda: self.count("article") == before + 2)
        return self.end()

    def end(self) -> str:
        """Waits for the end of the newest answer: its text."""
        until(lambda: self.count("article:last-child[aria-busy=false]") == 1)
        return self.run("return document.querySelector('article:last-child p').textContent;")

    def complaints(self) -> list[str]:
        """Of the browser about the page, since the last time."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def origins(self) -> set[str]:
        """Whom something was asked of, since the last time."""
        events = (json.loads(entry["message"]) for entry in self.browser.get_log("performance"))
        sent = [event["message"] for event in events]
        sent = [one for one in sent if one["method"] == "Network.requestWillBeSent"]
        return {"/".join(one["params"]["request"]["url"].split("/")[:3]) for one in sent}
