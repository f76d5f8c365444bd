"""Curves of runs on one grid: known differences come out, and each bad input is one line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.train.compare import compare, faded_average, main, read_curve
from tests.commands import help_of
from tests.tolerances import FLOAT64

ROOT = Path(__file__).parents[2]


def write_run(
    path: Path, rows: int = 8, every: int = 10, steps: int = 400, factor: float = 1.0
) -> Path:
    """A run whose loss is a known function of tokens, times `factor`."""
    path.mkdir(parents=True)
    entries = []
    for step in range(1, steps + 1):
        place = {"step": step, "tokens": step * rows * 100}
        if step == 1 or step % every == 0:
            loss = factor * curve(place["tokens"])
            entries.append(place | {"kind": "train", "main_loss": loss})
        if step % 100 == 0:
            bits = {"kind": "validation", "bits_per_byte": step / 100, "loss": 1.0}
            entries.append(place | bits)
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def curve(tokens: float) -> float:
    return 2 + 5 * math.exp(-tokens / 100_000)


def direct_average(tokens: np.ndarray, values: np.ndarray, smoothing: float) -> np.ndarray:
    """The definition, place by place."""
    averages = []
    for place, here in enumerate(tokens):
        weights = np.exp(-(here - tokens[: place + 1]) / smoothing)
        averages.append((weights * values[: place + 1]).sum() / weights.sum())
    return np.array(averages)


def test_the_faded_average_equals_its_definition():
    draw = np.random.default_rng(0)
    tokens, values = np.cumsum(draw.integers(1, 90, 200)).astype(float), draw.normal(size=200)
    expected = direct_average(tokens, values, 500.0)
    assert faded_average(tokens, values, 500.0) == pytest.approx(expected, rel=FLOAT64)


def test_a_loss_that_is_two_percent_higher_is_shown_as_such(tmp_path: Path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", factor=1.02)]
    compared = compare([read_curve(str(run)) for run in runs], None)
    assert compared.difference(1) == pytest.approx(0.02, rel=1e-9)
    assert compared.smoothing == pytest.approx(0.05 * (400 - 1) * 800)


def test_logging_intervals_and_batch_sizes_make_no_difference(tmp_path: Path):
    dense = write_run(tmp_path / "dense", every=1)
    coarse = write_run(tmp_path / "coarse", rows=16, every=5, steps=300)
    compared = compare([read_curve(str(run)) for run in (dense, coarse)], 20_000)
    assert compared.tokens_N[0] == 1600
    assert compared.tokens_N[-1] == 320_000
    assert np.abs(compared.difference(1)).max() < 1e-3
    assert len(compared.tokens_N) == 399  # all places of the dense run from the coarse one's first


def test_an_equal_run_differs_by_nothing(tmp_path: Path):
    one = read_curve(str(write_run(tmp_path / "a")))
    assert (compare([one, one], None).difference(1) == 0).all()


def test_a_taken_back_stretch_counts_once(tmp_path: Path):
    run = write_run(tmp_path / "a")
    again = {"kind": "train", "step": 400, "tokens": 320_000, "main_loss": 99.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
        file.write(json.dumps(again | {"tokens": 320_001, "main_loss": None}) + "\n")
    found = read_curve(str(run))
    assert (found.tokens_N[-1], found.loss_N[-1]) == (320_000, 99.0)
    assert len(found.tokens_N) == 41


# The command


def test_runs_of_one_name_are_called_as_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(Path(name))) for name in ("a/tiny", "b/tiny", "b/other")]
    assert main(runs) == 0
    _, _, *rows, _ = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["a/tiny", "b/tiny", "other"]


def test_the_command_prints_a_line_a_run_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "base-001")
    write_run(tmp_path / "runs" / "wide-$x_001", factor=0.99, steps=250)
    main(["base-001", "runs/wide-$x_001", "--out", "here.png", "--smoothing", "8000"])
    printed = capsys.readouterr().out
    assert "EMA over 8k tokens, after 200,000 tokens" in printed
    base, other = (line.split() for line in printed.splitlines() if "001 " in line)
    average = float(base[1])
    # Entries every 8k tokens, faded over as many, are 0.58 of that old on average.
    assert average == pytest.approx(curve(200_000 - 0.58 * 8000), abs=0.005)
    # Validations after 80, 160, 240 k tokens; the first of the nearest.
    assert base[2:] == ["2.000", "160k"]
    assert other[1:4] == [f"{0.99 * average:.4f}", "-1.00%", "-1.00%"]
    assert (tmp_path / "here.png").read_bytes().startswith(b"\x89PNG")


def test_help_tells_the_options_and_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.train.compare")
    assert "--smoothing" in shown
    assert loaded.isdisjoint({"jax", "jaxlib", "flax", "optax", "matplotlib"})


BAD = [
    ("", "runs to compare: found none; allowed: two or more"),
    ("a", "runs to compare: found a; allowed: two or more"),
    ("a nowhere", "nowhere: no such run; allowed: a run's folder, or its name in runs/"),
    ("a young", "young: this run has no entries yet (no metrics.jsonl)"),
    ("a diverged", "no training entry with a finite loss"),
    ("a late", "the runs share no range of tokens: found a 800 to 320,000; late 4,000,000 to"),
    ("a broken", "broken/metrics.jsonl, line 1: found b'no json'; allowed: a metrics entry"),
    ("a b --out none/c.png", "--out none/c.png cannot be written: No such file or directory"),
    ("a b --out c.txt", "--out is c.txt; allowed: a file that ends in .png, .svg, .pdf"),
    ("a b --smoothing 0", "--smoothing is 0; allowed: at least 1 token"),
    ("a b --smooth 3", "Unrecognized options: --smooth"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_input_ends_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: str,
    said: str,
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    for name in ("young", "diverged", "late", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "young" / "config.json").write_text("{}")
    lost = {"kind": "train", "step": 1, "tokens": 800, "main_loss": None}
    (tmp_path / "diverged" / "metrics.jsonl").write_text(json.dumps(lost) + "\n")
    late = lost | {"tokens": 4_000_000, "main_loss": 2.0}
    (tmp_path / "late" / "metrics.jsonl").write_text(json.dumps(late) + "\n")
    (tmp_path / "broken" / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert said in line
    assert not (tmp_path / "compare.png").exists()
