"""Statistics, to the number: lengths, formats, fates; and the report that shows them."""

import statistics as plain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.posttrain.formats import FORMATS
from dsv3_jax.posttrain.sample_statistics import lengths, of_texts, staged, statistics
from dsv3_jax.posttrain.selection import select
from dsv3_jax.posttrain.synthesis_options import Selection
from dsv3_jax.posttrain.synthesis_report import markdown, write_report
from tests.posttrain.scripted_models import problem
from tests.posttrain.test_selection import ONE, REJECTED, TWO, candidate


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=120))
def test_lengths_are_those_of_a_plain_count(values: list[int]):
    found = lengths(values)
    assert found["count"] == len(values)
    assert found["total"] == sum(values)
    assert found["mean"] == pytest.approx(plain.fmean(values))
    assert (found["least"], found["most"]) == (min(values), max(values))
    for share in (50, 90, 99):  # the nearest rank: the least value that so many do not exceed
        enough = (
            x for x in sorted(values) if 100 * sum(y <= x for y in values) >= share * len(values)
        )
        assert found[f"p{share}"] == next(enough)


def test_no_lengths_are_none():
    assert lengths([]) is None


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("plain", set()),
        ("so \\boxed{4}", {"boxed answer"}),
        ("<think>\na\n</think>\n\nb", {"reasoning", "several paragraphs"}),
        ("see\n```\nx\n```", {"code block"}),
        ("- a\n- b", {"list"}),
        ("1. a", {"list"}),
        ("a - b 1. c # d", set()),
        ("## Title\ntext", {"heading"}),
        ("#hash", set()),
        ("a\n\nb", {"several paragraphs"}),
        ("a\n\n", set()),
        (' {"a": [1]}', {"JSON"}),
        ("[1", set()),
        ("4", set()),
    ],
)
def test_formats(text: str, formats: set[str]):
    assert {name for name, has in FORMATS.items() if has(text)} == formats


def test_formats_of_long_blank_runs_are_found_in_one_pass():
    for blanks in ("\n" * 200_000, " \n" * 100_000, " " * 200_000):
        assert not any(has(f"a{blanks}") for has in FORMATS.values())
    assert FORMATS["several paragraphs"]("a" + "\n" * 200_000 + "b")
    assert FORMATS["list"]("a" + "\n" * 200_000 + " - b")


@pytest.fixture
def few():
    writing = problem(id="3", kind="writing")
    return [
        candidate(ONE, 0, "one two \\boxed{2}", tokens=7),
        candidate(ONE, 1, "no", tokens=None, **REJECTED),
        candidate(TWO, 0, failed="the prompt is too long"),
        candidate(writing, 0, "机器", tokens=2),
        candidate(writing, 1, "other words", tokens=4),
    ]


def test_a_small_set_is_counted_exactly(few):
    selected = select(few, Selection(), None, {})
    found = statistics(few, selected, num_problems=5, skipped=2)
    assert {name: found[name] for name in list(found)[:4]} == {
        "problems": 5,
        "problems contaminated": 2,
        "problems with a sample": 2,
        "candidates": 5,
    }
    fates = {name: count for name, count in found["fates"].items() if count}
    assert fates == {"failed": 1, "rejected": 1, "beyond --keep": 1, "kept": 2}
    assert found["rejections"] == {"boxed": 1}
    assert found["failures"] == {"the prompt is too long": 1}
    everything = found["texts"]["all"]
    assert [everything[stage]["count"] for stage in everything] == [4, 3, 2]
    assert everything["candidates"]["words"]["total"] == 4 + 1 + 2 + 2
    assert everything["kept"]["words"]["total"] == 4 + 2
    assert everything["kept"]["characters"]["total"] == len("one two \\boxed{2}") + 2
    assert everything["candidates"]["tokens"]["count"] == 3  # one was not counted
    assert found["texts"]["writing"]["accepted"]["tokens"]["total"] == 6
    assert found["texts"]["writing"]["kept"]["formats"]["boxed answer"] == 0
    assert found["texts"]["reasoning_original"]["kept"]["formats"]["boxed answer"] == 1
    assert list(found["texts"]) == ["all", "reasoning_original", "writing"]
    assert of_texts([], [])["words"] is None


def test_the_report_shows_it_and_its_picture_is_small(few, tmp_path: Path):
    selected = select(few, Selection(), None, {})
    found = statistics(few, selected, num_problems=5, skipped=2)
    settings_ = {"--stop": ["|"], "--kind": None}
    write_report(tmp_path, found, settings_, staged(few, selected))
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "lengths.png"}
    assert (tmp_path / "lengths.png").stat().st_size < 100_000
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(found, settings_)
    for line in (
        "| near duplicate | 0 |",
        "| kept | 2 |",
        "| all | candidates | 4 | 9 | 2.2 | 1 | 2 | 4 | 4 | 4 |",
        '| --stop | ["\\|"] |',
        "| the prompt is too long | 1 |",
    ):
        assert f"\n{line}\n" in text


def test_a_run_without_any_answer_has_a_report_too(tmp_path: Path):
    selected = select([], Selection(), None, {})
    found = statistics([], selected, num_problems=1, skipped=1)
    write_report(tmp_path, found, {}, staged([], selected))
    assert "| kept | 0 |" in (tmp_path / "report.md").read_text()
