"""Closed forms are the simulator's figures wherever they say that they hold."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.parallel.schedules import NAMES, fits, make, simulate
from dsv3_jax.plan.bubbles import FORMULAS

numbers = st.fractions(Fraction(1, 4), 4, max_denominator=4)


@given(
    name=st.sampled_from(NAMES),
    ranks=st.integers(1, 8),
    microbatches=st.integers(1, 24),
    W=numbers,
    over=numbers,
    hidden=st.fractions(0, 1, max_denominator=8),
)
def test_formulas_hold_where_they_say(name, ranks, microbatches, W, over, hidden):
    """F = b = W + over, pairs between B and F + B; exact, in fractions."""
    if not fits(name, ranks, microbatches):
        return
    F = W + over
    B = F + W
    FB = B + F * hidden
    timeline = simulate(make(name, ranks, microbatches), F, B, W, FB)
    formula = FORMULAS[name]
    assert max(timeline.peak) == formula.peak(ranks, microbatches)
    assert timeline.schedule.chunks == formula.stages_on_rank
    if name != "zb1p" or microbatches >= ranks:
        expected = formula.bubble(ranks, F, B, W, FB)
        assert float(timeline.bubble) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("name", "times", "microbatches"),
    [
        ("zb1p", {"W": 1.5, "B": 3}, 8),  # W > F
        ("zb1p", {"B": 1.5}, 8),  # W > B - W
        ("zb1p", {}, 3),  # N < P
        ("dualpipe", {"B": 3, "FB": 4}, 8),  # B - W > F
        ("dualpipe", {"F": 1, "B": 3, "W": 2, "FB": 4}, 8),  # W > F
        ("dualpipe", {"FB": 1.5}, 8),  # FB < B
        ("dualpipev", {"FB": 4}, 8),  # FB > F + B
    ],
)
def test_each_condition_is_needed(name, times, microbatches):
    times = {"F": 1, "B": 2, "W": 1, "FB": 3} | times
    timeline = simulate(make(name, 4, microbatches), **times)
    assert timeline.bubble != pytest.approx(FORMULAS[name].bubble(4, *times.values()))


def test_every_schedule_has_a_row_and_v_is_dualpipe_of_twice_the_ranks():
    assert tuple(FORMULAS) == NAMES
    dual, vee = FORMULAS["dualpipe"], FORMULAS["dualpipev"]
    for ranks in (2, 4, 8):
        assert vee.bubble(ranks, 1, 2, 1, 2.5) == dual.bubble(2 * ranks, 1, 2, 1, 2.5)
        assert vee.peak(ranks, 99) == dual.peak(2 * ranks, 99)
