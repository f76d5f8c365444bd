"""Smoothing is what it says, thinning keeps spikes, files are named by their suffix."""

import math
import random
from pathlib import Path

import pytest

from dsv3_jax import drawing
from dsv3_jax.drawing import column, new_figure, save_picture, smoothed, thinned
from tests.tolerances import FLOAT64


def direct_average(values: list[float], place: int) -> float:
    """The definition, term by term."""
    reach = drawing.SMOOTHING * len(values)
    weights = [
        math.exp(-abs(i - place) / reach) if math.isfinite(value) else 0.0
        for i, value in enumerate(values)
    ]
    terms = (w * v for w, v in zip(weights, values, strict=True) if w)
    return sum(terms) / sum(weights)


@pytest.mark.parametrize("gaps", [(), (0, 7, 8, 199)])
def test_smoothing_equals_its_definition(gaps):
    draw = random.Random(1)
    values = [math.nan if i in gaps else 3 + draw.gauss(0, 1) for i in range(200)]
    for place, average in enumerate(smoothed(values)):
        if place in gaps:
            assert math.isnan(average)
        else:
            assert average == pytest.approx(direct_average(values, place), rel=FLOAT64)


def test_smoothing_does_not_lag_behind_a_falling_loss():
    falling = [10.0 - 0.02 * i for i in range(300)]
    assert smoothed(falling)[100:200] == pytest.approx(falling[100:200], rel=1e-6)


def test_a_handful_of_points_is_left_as_it_is():
    assert smoothed([4.0, 3.0, 5.0]) == pytest.approx([4.0, 3.0, 5.0])
    assert smoothed([]) == []


def test_a_column_has_gaps_where_nothing_finite_is():
    entries = [{"a": 1}, {}, {"a": None}, {"a": math.inf}, {"a": 0.5}]
    assert [v for v in column(entries, "a") if not math.isnan(v)] == [1.0, 0.5]
    assert len(column(entries, "a")) == 5


def test_a_thinned_curve_is_small_and_keeps_both_ends_of_every_spike():
    draw = random.Random(2)
    x = [float(i) for i in range(24_000)]
    y = [draw.random() for _ in x]
    y[777], y[13_000] = 50.0, -50.0
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) == len(thin_y) == 600
    assert (777.0, 50.0) in zip(thin_x, thin_y, strict=True)
    assert (13_000.0, -50.0) in zip(thin_x, thin_y, strict=True)
    assert thin_x == sorted(thin_x)
    assert set(zip(thin_x, thin_y, strict=True)) <= set(zip(x, y, strict=True))


def test_thinning_leaves_short_curves_alone_and_long_gaps_open():
    assert thinned([1.0, 2.0], [3.0, math.nan])[0] == [1.0, 2.0]
    y = [1.0] * 1000 + [math.nan] * 1000
    _, thin_y = thinned([float(i) for i in range(2000)], y, bins=10)
    assert math.isnan(thin_y[-1])
    assert thin_y[0] == 1.0


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.PDF"])
def test_the_suffix_is_the_format_and_equal_figures_give_equal_bytes(tmp_path: Path, name: str):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        with new_figure(2, 1) as figure:
            figure.subplots().plot([1, 2], [3, 4])
            save_picture(figure, tmp_path / folder / name, "--out")
    one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
    assert one == two
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[2:].lower()]
    assert one.startswith(head)


def test_a_bad_place_for_a_picture_is_named(tmp_path: Path):
    with new_figure(1, 1) as figure:
        with pytest.raises(ValueError, match=r"--out is a\.gif; allowed: .* \.png, \.svg, \.pdf"):
            save_picture(figure, Path("a.gif"), "--out")
        with pytest.raises(OSError, match=r"--out .*none/a\.png cannot be written: No such file"):
            save_picture(figure, tmp_path / "none" / "a.png", "--out")
    assert list(tmp_path.iterdir()) == []
