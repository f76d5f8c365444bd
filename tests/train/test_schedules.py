"""Values over a run: warm-up to the step, phases to the token."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import Phase, ScheduleConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.train.schedules import learning_rate, value_at

ROOT = Path(__file__).parents[2]
T = 10**12


def test_warm_up_is_linear_in_steps_and_full_with_its_last():
    cfg = ScheduleConfig(learning_rate=0.3, warmup_steps=10, phases=(Phase(100, 0.3),))
    rates = [learning_rate(cfg, step, 0, 1) for step in range(13)]
    assert rates[:10] == pytest.approx([0.03 * (step + 1) for step in range(10)], rel=1e-15)
    assert rates[8] < rates[9] == rates[10] == rates[12] == 0.3
    assert learning_rate(replace(cfg, warmup_steps=0), 0, 0, 1) == 0.3


def test_warm_up_scales_whatever_the_tokens_ask_for():
    cfg = ScheduleConfig(learning_rate=1.0, warmup_steps=4, phases=(Phase(100, 0.0, "linear"),))
    assert learning_rate(cfg, 1, 50, 1) == 0.5 * 0.5


def test_without_phases_a_cosine_spans_the_whole_run():
    cfg = ScheduleConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=1)
    rates = [learning_rate(cfg, 5, tokens, 1000) for tokens in (0, 250, 500, 750, 1000, 5000)]
    quarter = (1 - math.cos(math.pi / 4)) / 2
    expected = [1.0, 1 - 0.8 * quarter, 0.6, 0.2 + 0.8 * quarter, 0.2, 0.2]
    assert rates == pytest.approx(expected, rel=1e-15)
    steps = [learning_rate(cfg, 5, tokens, 1000) for tokens in range(1001)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("shape", "start", "middle", "last"),
    [("constant", 2.0, 2.0, 2.0), ("linear", 8.0, 5.0, 2.0), ("cosine", 8.0, 5.0, 2.0)],
)
def test_a_phase_takes_its_shape_and_ends_at_its_value(
    shape: str, start: float, middle: float, last: float
):
    phases = (Phase(1000, 2.0, shape),)
    values = [value_at(8.0, phases, tokens) for tokens in (0, 500, 1000, 10**9)]
    assert values == pytest.approx([start, middle, last, last], rel=1e-15)
    quarter = {"constant": 2.0, "linear": 6.5, "cosine": 8 - 3 * (1 - math.sqrt(0.5))}[shape]
    assert value_at(8.0, phases, 250) == pytest.approx(quarter, rel=1e-15)


def test_a_phase_starts_where_the_one_before_ended():
    phases = (Phase(10, 4.0, "linear"), Phase(10, 1.0), Phase(10, 3.0, "linear"))
    values = [value_at(8.0, phases, tokens) for tokens in (0, 9, 10, 19, 20, 25, 29, 30)]
    assert values == pytest.approx([8.0, 4.4, 1.0, 1.0, 1.0, 2.0, 2.8, 3.0], rel=1e-15)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 4_300 * 10**9 // 2, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (14_300 * 10**9, 2.2e-5),
        (14_633 * 10**9 - 1, 2.2e-5),
        (14_633 * 10**9, 7.3e-6),
        (14_800 * 10**9, 7.3e-6),
    ],
)
def test_the_learning_rate_of_671b_follows_the_report_to_the_token(tokens: int, rate: float):
    """Report 4.2: 2.2e-4 until 10T, cosine to 2.2e-5 over 4.3T, 333B at that, 167B at 7.3e-6."""
    schedule = load_config(ROOT / "configs" / "dsv3_671b.py").schedule
    assert learning_rate(schedule, 10**6, tokens, 0) == pytest.approx(rate, rel=1e-12)


def test_the_learning_rate_of_671b_warms_up_over_2000_steps_and_never_jumps_up():
    schedule = load_config(ROOT / "configs" / "dsv3_671b.py").schedule
    assert learning_rate(schedule, 0, 0, 0) == pytest.approx(2.2e-4 / 2000, rel=1e-15)
    assert learning_rate(schedule, 1998, 0, 0) < learning_rate(schedule, 1999, 0, 0) == 2.2e-4
    later = [learning_rate(schedule, 2000, share * T // 100, 0) for share in range(1481)]
    assert later == sorted(later, reverse=True)
