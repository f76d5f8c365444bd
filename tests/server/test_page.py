"""The chat page: what it is made of, and what its reader meets in a real browser."""

import re
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dsv3_jax.inference.requests import Answer, Request
from dsv3_jax.server.keys import Keys
from tests.server.browsing import BACKSPACE, ENTER, ESCAPE, SHIFT, TAB, Page, chromium
from tests.server.clients import until
from tests.server.scripted import END, TOKENIZER, ScriptedEngine, ids_of, saying, service_of
from tests.server.serving import serving

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[2]
HOSTILE = "</p><img src=x onerror='window.ran=1'><script>window.ran=1</script>&lt;\n  <b>end"
# Of text and what lies behind it, as WCAG 2 wants it.
LEAST_CONTRAST = 4.5


def test_the_page_is_one_file_with_one_script_and_one_style_and_names_no_other_host():
    page = resources.files("dsv3_jax.server").joinpath("chat.html").read_text("utf-8")
    for name in ("script", "style"):
        assert re.findall(rf"<{name}\b[^>]*>", page) == [f"<{name}>"]
        assert page.count(f"</{name}>") == 1
    assert not re.search(r"//\w", page)
    assert not re.search(r"\s(on\w+|style)\s*=\s*[\"']", page)
    assert not re.search(r"(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b", page)


def test_the_page_is_installed_with_the_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert any(
        fnmatch("chat.html", pattern) for pattern in setup["package-data"]["dsv3_jax.server"]
    )


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Chrome]":
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@dataclass
class Paused:
    """Writes a text, then waits, then a second text."""

    first: str
    second: str
    seen: list[Request] = field(default_factory=list)
    goes_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: Request) -> Iterator[int]:
        self.seen.append(request)
        yield from ids_of(self.first)
        assert self.goes_on.wait(60)
        yield from [*ids_of(self.second), END]


@dataclass
class DraftingEngine(ScriptedEngine):
    """Each turn looks at four drafts, and three stay."""

    def go_on(self) -> list[Answer]:
        self.statistics.offered[0] += 4
        self.statistics.accepted[0] += 3
        return super().go_on()


def asked(request: Request) -> str:
    """The conversation, with | before every speaker's turn. This tokenizer has no marks of its own
    for speakers, so they are text.
    """
    return re.sub("<｜(User|Assistant)｜>", "|", TOKENIZER.decode(request.prompt))


@pytest.mark.slow
def test_an_answer_streams_in_and_its_end_tells_how_fast(browser):
    writes = Paused("one ", "two")
    with serving(service_of(ScriptedEngine(writes))) as base:
        page = Page(browser, base)
        until(lambda: page.text("h1") == "scripted")
        page.type("#question", "hi", ENTER)
        until(lambda: page.text("article:last-child p") == "one")
        assert page.count("article:last-child[aria-busy=true]") == 1
        assert re.fullmatch(r"≈ [\d.]+ tokens/s", page.text("article:last-child div"))
        assert not page.shows("#send")
        writes.goes_on.set()
        assert page.end() == "one two"
        assert re.fullmatch(r"7 tokens · [\d.]+ tokens/s", page.text("article:last-child div"))
        assert page.shows("#send")
        assert not page.shows("#stop")
        assert page.complaints() == []
        assert page.origins() - {"data:,"} == {base}


@pytest.mark.slow
def test_the_share_of_accepted_drafts_is_told_where_there_are_drafts(browser):
    with serving(service_of(DraftingEngine(saying("some text")))) as base:
        page = Page(browser, base)
        for _ in range(2):
            page.answer("hi")
            assert page.text("article:last-child div").endswith("/s · 75 % of drafts accepted")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["button", "key"])
def test_stopping_ends_the_text_on_the_server_and_keeps_what_was_written(browser, way):
    engine = ScriptedEngine(seconds=0.05)
    service = service_of(engine)
    with serving(service) as base:
        page = Page(browser, base)
        page.type("#question", "hi", ENTER)
        until(lambda: page.text("article:last-child p").startswith("0 1"))
        assert service.thread.open == 1
        if way == "button":
            page.click("#stop")
        else:
            page.press(ESCAPE)
        until(lambda: service.thread.open == 0 and not engine.pending, seconds=2)
        kept = page.end()
        assert kept.startswith("0 1")
        assert page.text("article:last-child div").endswith(" · stopped")
        assert page.text("#error") == ""
        writes = Paused("", "more")
        writes.goes_on.set()
        engine.writes = writes
        assert page.answer("and") == "more"
        assert asked(writes.seen[0]) == f"|hi|{kept}|and|"


@pytest.mark.slow
def test_what_models_users_and_servers_write_is_text_and_nothing_else(browser):
    service = service_of(ScriptedEngine(saying(HOSTILE)))
    named = replace(service, jobs=replace(service.jobs, name=HOSTILE))
    with serving(named) as base:
        page = Page(browser, base)
        until(lambda: page.text("h1") == HOSTILE)
        before = page.count("*")
        page.run("document.querySelector('#question').value = a[0];", HOSTILE)
        assert page.answer("") == HOSTILE
        assert page.text("article:first-child p") == HOSTILE
        assert page.text("article:last-child h2") == HOSTILE
        assert page.count("*") == before + 2 * 4
        assert page.run("return window.ran;") is None
        assert page.complaints() == []


@pytest.mark.slow
def test_the_policy_refuses_what_is_not_the_pages_own(browser):
    with serving(service_of(ScriptedEngine(saying("x")))) as base:
        page = Page(browser, base)
        until(lambda: page.text("h1") == "scripted")
        port = int(base.rpartition(":")[2])
        width = page.run("return document.body.clientWidth;")
        page.run(
            """window.refused = [];
            addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
            const add = (tag, more) => document.body.append(
                Object.assign(document.createElement(tag), more));
            add("script", { textContent: "window.ran = 1" });
            add("style", { textContent: "body { width: 1px }" });
            add("img", { src: a[0] });
            add("iframe", { src: a[0] });
            document.body.setAttribute("onclick", "window.ran = 1");
            document.body.setAttribute("style", "width: 1px");
            document.body.click();
            setTimeout(() => eval("window.ran = 1"));  // a driver's own script may evaluate text
            await fetch(a[0]).catch(() => null);""",
            f"http://127.0.0.1:{port - 1}/",
        )
        directives = "connect frame img script script-attr script-elem style-attr style-elem"
        directives = {re.sub(r"^(\w+)", r"\1-src", name) for name in directives.split()}
        until(lambda: set(page.run("return refused;")) >= directives)
        assert page.run("return window.ran;") is None
        assert page.run("return document.body.clientWidth;") == width


@pytest.mark.slow
def test_a_key_is_asked_for_tried_again_and_kept_for_the_tab_alone(browser):
    with serving(service_of(ScriptedEngine(saying("yes")), keys=Keys(["right"]))) as base:
        page = Page(browser, base)
        until(lambda: page.text("#error") == "the server wants an API key")
        assert page.run("return document.activeElement.id;") == "key"
        page.press("wrong", ENTER)
        until(lambda: page.text("#error") == "the server does not know this API key")
        page.type("#question", "hi", ENTER)
        until(lambda: page.value("#question") == "hi" and page.shows("#send"))
        assert page.count("article") == 0
        page.type("#key", "right", ENTER)
        until(lambda: page.text("h1") == "scripted")
        assert not page.shows("#key-form")
        assert page.text("#error") == ""
        assert page.answer("!") == "yes"
        assert page.text("article:first-child p") == "hi!"
        page.browser.refresh()
        until(lambda: page.text("h1") == "scripted")
        kept = page.run("return [Object.values(sessionStorage), localStorage.length];")
        assert kept == [["right"], 0]
        assert page.run("return document.cookie + location.href;") == f"{base}/"


@pytest.mark.slow
def test_the_servers_errors_are_one_line_and_cost_no_text(browser):
    engine = ScriptedEngine(saying("x" * 40))
    with serving(service_of(engine)) as base:
        page = Page(browser, base)
        until(lambda: page.text("h1") == "scripted")
        long = "x" * 300
        page.type("#question", long, ENTER)
        until(lambda: page.text("#error").startswith("the prompt has 3"))
        assert page.text("#error").endswith("; allowed: at most 255 tokens")
        assert page.value("#question") == long
        assert page.count("article") == 0
        page.run("document.querySelector('#question').value = '';")
        engine.fails_at = engine.turns + 20
        assert re.fullmatch("x{10,20}", page.answer("hi"))
        assert page.text("#error") == "the engine has failed"
        assert page.text("article:last-child div").endswith(" · not finished")
        assert "\n" not in page.run("return document.querySelector('#error').innerText;")
    page.type("#question", "hi", ENTER)
    until(lambda: page.text("#error") == "the server cannot be reached")
    assert page.value("#question") == "hi"
    assert page.count("article") == 2


@pytest.mark.slow
def test_settings_and_the_conversation_so_far_reach_the_model(browser):
    writes = Paused("", "ok")
    writes.goes_on.set()
    with serving(service_of(ScriptedEngine(writes))) as base:
        page = Page(browser, base)
        page.answer("plain")
        page.click("#open-settings")
        for name, value in (("system", "be"), ("temperature", "3"), ("top-p", "0.5")):
            page.type(f"#{name}", value)
        page.type("#most-tokens", "7")
        page.click("#open-settings")
        page.type("#question", "a", SHIFT + ENTER, SHIFT, "b", ENTER)
        until(lambda: page.shows("#settings"))  # the temperature is refused, and shown
        assert page.value("#question") == "a\nb"
        assert page.count("article") == 2
        page.type("#temperature", BACKSPACE, "0")
        assert page.answer("!") == "ok"
        page.click("#anew")
        assert page.count("article") == 0
        assert page.answer("new") == "ok"
    plain, set_, _ = writes.seen
    assert (plain.temperature, plain.top_p, plain.max_tokens) == (1, 1, 256 - len(plain.prompt))
    assert (set_.temperature, set_.top_p, set_.max_tokens) == (0, 0.5, 7)
    told = [asked(request) for request in writes.seen]
    assert told == ["|plain|", "be|plain|ok|a\nb!|", "be|new|"]


@pytest.mark.slow
def test_a_new_chat_ends_the_answer_of_the_old_one(browser):
    service = service_of(ScriptedEngine(seconds=0.05))
    with serving(service) as base:
        page = Page(browser, base)
        page.type("#question", "hi", ENTER)
        until(lambda: page.text("article:last-child p") != "")
        page.click("#anew")
        until(lambda: service.thread.open == 0, seconds=2)
        assert page.count("article") == 0
        assert page.value("#question") == page.text("#error") == ""
        assert page.shows("#send")


@pytest.mark.slow
def test_the_end_of_the_conversation_stays_in_sight_of_a_reader_who_is_there(browser):
    height, place = (f"return document.querySelector('#log').scroll{x};" for x in ("Height", "Top"))
    writes = Paused("a\n" * 60, "b\n" * 60)
    with serving(service_of(ScriptedEngine(writes))) as base:
        page = Page(browser, base)
        page.type("#question", "hi", ENTER)
        until(lambda: page.text("article:last-child p") == "a\n" * 59 + "a")
        assert page.run(place) > 100
        page.run("const log = document.querySelector('#log'); log.scrollTop = 50;")
        until(lambda: not page.run("return isAtEnd;"))
        before = page.run(height)
        writes.goes_on.set()
        page.end()
        assert page.run(height) > before
        assert page.run(place) == 50


@pytest.mark.slow
def test_events_are_the_same_wherever_their_bytes_are_cut(browser):
    stream = (
        'data: {"a":"€"}\n\n: nothing\r\ndata:one\r\ndata:  two\r\n\r\ndata: [DONE]\n\ndata: x\n'
    )
    with serving(service_of(ScriptedEngine())) as base:
        found = Page(browser, base).run(
            """const bytes = new TextEncoder().encode(a[0]), found = new Set();
            const read = async (pieces) => {
                const stream = new ReadableStream({ start(to) {
                    for (const piece of pieces) to.enqueue(piece);
                    to.close();
                } });
                const told = [];
                for await (const event of events(stream)) told.push(event);
                found.add(JSON.stringify(told));
            };
            for (let i = 0; i <= bytes.length; i++) await read([bytes.slice(0, i), bytes.slice(i)]);
            await read(Array.from(bytes, (byte) => Uint8Array.of(byte)));
            return [...found].map(JSON.parse);""",
            stream,
        )
    assert found == [['{"a":"€"}', "one\n two", "[DONE]"]]


@pytest.mark.slow
def test_a_keyboard_reaches_all_and_a_screen_reader_hears_what_it_is(browser):
    with serving(service_of(ScriptedEngine(saying("yes")))) as base:
        page = Page(browser, base)
        until(lambda: page.text("h1") == "scripted")
        page.run("document.querySelector('#key-form').hidden = false;")
        page.type("#anew", SHIFT + TAB)
        order = [page.run("return document.activeElement.id;")]
        page.press(ENTER)
        for _ in range(10):
            page.press(TAB)
            order.append(page.run("return document.activeElement.id;"))
        expected = "open-settings anew system temperature top-p most-tokens key  log question send"
        assert order == expected.split(" ")
        for element in page.browser.find_elements("css selector", "button, input, textarea, form"):
            assert element.accessible_name or element.get_attribute("id") in ("ask", "stop")
        log = page.browser.find_element("id", "log")
        assert (log.aria_role, log.accessible_name) == ("log", "Conversation")
        assert page.browser.find_element("id", "question").accessible_name.startswith("Message")
        page.answer("hi")
        assert page.run("return document.activeElement.id;") == "question"


def contrasts(page: Page) -> list[float]:
    """Of every element's own text with what lies behind it."""
    pairs = page.run(
        """const behind = (element) => {
            const own = getComputedStyle(element).backgroundColor;
            return own === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : own;
        };
        return [...document.body.querySelectorAll("*")]
            .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.data?.trim()))
            .map((e) => [getComputedStyle(e).color, behind(e)]);"""
    )
    return [_contrast(*(_luminance(color) for color in pair)) for pair in pairs]


def _luminance(color: str) -> float:
    """WCAG 2's, of an rgb(...)."""
    values = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.slow
def test_it_is_read_on_narrow_screens_by_day_and_by_night(browser):
    with serving(service_of(ScriptedEngine(saying("a" * 100)))) as base:
        page = Page(browser, base)
        size = {"width": 320, "height": 500, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        grounds = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            page.click("#open-settings")
            page.click("#anew")
            page.answer("b" * 100)
            found = contrasts(page)
            assert len(found) >= 10
            assert min(found) >= LEAST_CONTRAST
            assert page.run("return document.documentElement.scrollWidth;") <= 320
            assert page.run("return document.querySelector('#log').scrollWidth;") <= 320
            grounds.append(page.run("return getComputedStyle(document.body).backgroundColor;"))
        assert len(set(grounds)) == 2
