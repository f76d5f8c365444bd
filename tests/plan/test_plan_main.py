"""`python -m dsv3_jax.plan`: figures and picture of a schedule; one line for what cannot be."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dsv3_jax.parallel.schedules import NAMES
from dsv3_jax.plan.__main__ import Options, main
from tests.commands import help_of, mistake_of


def said(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, list[str]]:
    """Words behind the first one, or the number, of each line."""
    main(args)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def test_help_is_complete_and_loads_no_jax():
    text, loaded = help_of("dsv3_jax.plan.__main__")
    assert {"jax", "matplotlib"}.isdisjoint(loaded)
    for flag in ("--schedule", "--ranks", "--microbatches", "--timeline", "--FB", "--transfer"):
        assert flag in text


def test_simulated_figures_stand_beside_the_formulas(capsys):
    found = said(capsys, "--schedule", "dualpipe", "--FB", "2.2")
    assert found["dualpipe:"][-2:] == ["5.5%", "idle"]
    assert found["bubble"][:3] == ["3.6", "3.6", "="]
    assert found["live"][:3] == ["activations", "9", "9"]
    assert found["0"] == ["0,", "7", "2", "3.6%", "9"]
    assert [found[str(rank)][2] for rank in range(8)] == "2 2.8 3.6 3.6 3.6 3.6 2.8 2".split()


def test_times_are_taken_and_swaps_may_block(capsys):
    found = said(capsys, *"--schedule 1f1b --ranks 2 --microbatches 3 --F 2 --B 5".split())
    assert found["bubble"][:2] == ["7", "7"]
    assert found["step"] == ["28"]
    found = said(capsys, *"--schedule 1f1b --ranks 2 --microbatches 1 --transfer 0.5".split())
    assert (found["bubble"][0], found["step"]) == ("4", ["7"])


def test_a_pair_takes_both_passes_and_weights_half_of_a_backward_unless_told(capsys):
    args = "--schedule dualpipe --B 5".split()
    assert said(capsys, *args) == said(capsys, *args, *"--W 2.5 --FB 6".split())


def test_the_picture_is_written(tmp_path: Path, capsys):
    path = tmp_path / "out.png"
    found = said(capsys, "--schedule", "dualpipev", "--ranks", "2", "--timeline", str(path))
    assert found["picture:"]
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("", "--schedule"),
        ("--schedule dual", "Expected one of ('gpipe', '1f1b', 'zb1p', 'dualpipe', 'dualpipev')"),
        ("--schedule dualpipe --ranks 7", "dualpipe: ranks are 7; allowed: even, 2 or more"),
        ("--schedule 1f1b --ranks 101 --microbatches 1000", "allowed: up to 100,000"),
        ("--schedule gpipe --F 1e308", "times add up to more than a float holds; allowed: smaller"),
        ("--schedule gpipe --transfer x", "--transfer is 'x'; allowed: numbers"),
        ("--schedule zb1p --W 2", "zb1p: time of b (B - W) is 0; allowed: above 0, finite"),
        ("--schedule zb1p --F nan", "zb1p: time of F is nan; allowed: above 0, finite"),
        ("--schedule dualpipe --FB 0.1", "--FB is 0.1; allowed: at least 2, the longer one of"),
        ("--schedule 1f1b --W 5", "--W is 5; allowed: at most --B, 2, of which it is a part"),
        ("--schedule gpipe --W nan", "--W is nan; allowed: at most --B, 2"),
        ("--schedule 1f1b --ranks 2.5", "--ranks is '2.5'; allowed: whole numbers"),
        ("--schedule gpipe --transfer -1", "time of a transfer is -1; allowed: 0 or more"),
        ("--schedule gpipe --timeline a.jpg", "--timeline is a.jpg; allowed: a file that ends in"),
        ("--schedule gpipe --timeline nowhere/a.png", "nowhere/a.png cannot be written: No such"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_file(args, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert line in mistake_of(main, args.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_the_names_are_those_that_can_be_made():
    assert get_args(get_type_hints(Options)["schedule"]) == NAMES
