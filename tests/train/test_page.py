"""The page is whole, safe and the same each time, whatever a run has logged."""

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsv3_jax.config import OutputConfig, Phase, RunConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.train import page_pictures
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.page import page_html, write_page
from dsv3_jax.train.report import Result
from tests.logged import CFG, OLD, RESULT, event, make_entries

MACHINE = "two cores, jax 0.10.2"


def html(entries: list[dict], result: Result | None = RESULT, cfg: RunConfig = CFG) -> str:
    return page_html("tiny-001", cfg, MACHINE, entries, result)


@pytest.fixture(scope="module")
def page() -> str:
    """Of a complete run with one skipped update."""
    return html([*make_entries(), event("skipped")])


class Outline(HTMLParser):
    """Text, tags and addresses; fails on a tag that is not closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# What it says


def test_the_page_says_at_the_top_what_happened(page: str):
    text = Outline(page).text
    top = text[: text.index("Learning")]
    for said in (
        "Finished: all 400 steps",
        "the model wins: 25.0% fewer bits than zlib",
        "bits per byte 1.500 zlib -9: 2.000",
        "tokens 819.2k in 400 steps",
        "time 3:51",
        "tokens per second 3,540 18.0% of the matmul peak",
        "Trouble: 1 update skipped",
    ):
        assert said in top, said


def test_every_part_is_there_and_in_order(page: str):
    text = Outline(page).text
    parts = ["dotted lines are events", "Loss, nats per token", "Validation, bits per byte"]
    parts += ["Gradient norm", "MaxVio: 0 is balance", "Router biases", "layers.1", "mtp.0"]
    parts += ["Schedules", "Learning rate", "Rows of a step", "Bias speed γ", "MTP weight λ"]
    parts += ["Speed and memory", "Tokens per second", "Waiting for data", "Peak memory"]
    parts += ["Events", "skipped rows of a.py"]
    parts += ["What it writes", "sample 5", "sample 40", "return name"]
    parts += ["Configuration", "all of it", MACHINE]
    places = [text.find(part, text.find("Learning")) for part in parts]
    assert -1 not in places
    assert places == sorted(places)


def test_only_what_differs_from_the_default_run_is_in_the_table():
    phases = (Phase(0, 100, 1.0), Phase(100, 200, 0.5, "cosine"))
    run = tiny_run()
    schedule = replace(run.schedule, learning_rate_phases=phases)
    page = html([], None, replace(run, train=replace(run.train, steps=7), schedule=schedule))
    table = re.search(r"<table>.*?</table>", page)[0]
    assert re.findall(r"<td>(.*?)</td>", table) == [
        *("train.steps", "7", "400", "schedule.learning_rate_phases"),
        "begin 0, end 100, value 1.0, shape constant; begin 100, end 200, value 0.5, shape cosine",
        "[]",
    ]


def test_the_default_run_differs_in_nothing():
    assert "<table>" not in html([], None, tiny_run())


def test_the_page_holds_the_whole_configuration(page: str):
    folded = re.search(r"<details><summary>all of it</summary><pre>(.*?)</pre>", page, re.DOTALL)
    assert json.loads(unescape(folded[1])) == json.loads(CFG.to_json())


# Safe, whole, the same each time


HOSTILE = "</pre><script>alert(1)</script>\x00\x1b[2J\x9b\ud800 & \" ' <img src=x onerror=a>"


def test_nothing_a_run_contains_becomes_markup():
    sample = {"kind": "sample", "step": 1, "tokens": 9, "prompt": HOSTILE, "text": HOSTILE}
    loads = {"kind": "experts", "step": 1, "tokens": 9, "layers": [HOSTILE], "load_LE": [[1, 2]]}
    norms = {"kind": "train", "step": 1, "tokens": 9, "grad_norms": {HOSTILE: 1.0, "$x$": 2.0}}
    cfg = replace(CFG, output=OutputConfig(name="<b>", sample_prompt=HOSTILE[:-40]))
    result = replace(RESULT, sample_text=HOSTILE)
    entries = [sample, event(HOSTILE, HOSTILE), loads | {"bias_LE": [[0.1, 0.2]]}, norms]
    page = page_html(HOSTILE, cfg, HOSTILE, entries, result)
    outline = Outline(page)
    assert not {"script", "link", "iframe", "object"} & set(outline.tags)
    assert not [name for name in outline.attributes if name.startswith("on")]
    assert not set("\x00\x1b\x9b") & set(page)
    page.encode()


def test_the_page_needs_nothing_but_itself(page: str):
    addresses = {a for a in Outline(page).addresses if not a.startswith(("data:image/png", "#"))}
    assert addresses == {"metrics.jsonl", "config.json"}
    assert "url(http" not in page
    assert "@import" not in page
    assert not re.findall(r"https?://(?!www\.w3\.org/)", page)  # names of XML, fetched by nobody


def test_no_id_is_used_twice_and_every_reference_is_met(page: str):
    ids = Outline(page).ids
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used
    assert used <= set(ids)


def test_the_same_entries_give_the_same_bytes(page: str, tmp_path: Path):
    run = RunFolder(tmp_path / "tiny-001")
    run.path.mkdir()
    write_page(run, CFG, MACHINE, [*make_entries(), event("skipped")], RESULT)
    assert (run.path / "report.html").read_bytes() == page.encode()
    assert [path.name for path in run.path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        OLD,
        [{"kind": kind, "step": 3} for kind in "train validation experts event sample".split()],
        [entry | {"tokens": None} for entry in OLD],
        [{"kind": "experts", "step": 1, "tokens": 5, "layers": ["a"], "load_LE": [[0, 0]]}],
        [{"kind": "experts", "step": 1, "tokens": 0, "layers": [], "load_LE": []}],
        [{"kind": "train", "step": 1, "tokens": 5, "grad_norms": None, "grad_norm": 0.0}],
        [{"kind": "unheard-of", "step": 1}],
    ],
    ids=["none", "old", "bare", "no_tokens", "no_load", "no_layers", "zero", "unknown"],
)
def test_any_entries_make_a_page(entries: list[dict], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_pictures, "schedules", lambda entries, cfg: [])  # of the plan alone
    for result in (None, RESULT):
        page = html(entries, result)
        Outline(page)
        assert "Configuration" in page
        assert not re.search(r"\bnan\b", page, re.IGNORECASE)


@pytest.mark.slow
def test_a_long_run_of_a_large_model_makes_a_page_of_a_few_megabytes():
    train = [entry for entry in make_entries() if entry["kind"] == "train"]
    many = [e | {"tokens": e["tokens"] + 21 * i} for i in range(500) for e in train]
    loads = [e for e in make_entries(60, 256, 59) if e["kind"] == "experts"]
    page = html([*sorted(many, key=lambda e: e["tokens"]), *loads])
    assert len(page) < 4e6
    assert page.count("<img") == 59 + 1
