"""Values over a run: warm-up to the step, phases to the token, batch ramps to the row."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig, Phase, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.presets import tiny
from dsv3_jax.train.schedules import rows_after, rows_at, value_at, values_at

ROOT = Path(__file__).parents[2]
B = 10**9
T = 1000 * B


def run_of(rows: int = 8, length: int = 10, **schedule) -> RunConfig:
    return RunConfig(
        model=tiny(),
        data=DataConfig(length=length),
        train=TrainConfig(rows=rows, microbatches=rows),
        schedule=ScheduleConfig(**schedule),
    )


@pytest.fixture(scope="module")
def report() -> RunConfig:
    """The pre-training of the report."""
    return load_config(ROOT / "configs" / "dsv3_671b.py")


def test_warm_up_is_linear_in_steps_and_full_with_its_last():
    cfg = run_of(learning_rate=0.3, warmup_steps=10, learning_rate_phases=(Phase(0, 100, 0.3),))
    rates = [values_at(cfg, step, 0, 1).learning_rate for step in range(13)]
    assert rates[:10] == pytest.approx([0.03 * (step + 1) for step in range(10)], rel=1e-15)
    assert rates[8] < rates[9] == rates[10] == rates[12] == 0.3
    cold = replace(cfg, schedule=replace(cfg.schedule, warmup_steps=0))
    assert values_at(cold, 0, 0, 1).learning_rate == 0.3


def test_warm_up_scales_whatever_the_tokens_ask_for():
    phases = (Phase(0, 100, 0.0, "linear"),)
    cfg = run_of(learning_rate=1.0, warmup_steps=4, learning_rate_phases=phases)
    assert values_at(cfg, 1, 50, 1).learning_rate == 0.5 * 0.5


def test_without_phases_a_cosine_spans_the_whole_run():
    cfg = run_of(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=1)
    rates = [values_at(cfg, 5, tokens, 1000)[0] for tokens in (0, 250, 500, 750, 1000, 5000)]
    quarter = (1 - math.cos(math.pi / 4)) / 2
    expected = [1.0, 1 - 0.8 * quarter, 0.6, 0.2 + 0.8 * quarter, 0.2, 0.2]
    assert rates == pytest.approx(expected, rel=1e-15)
    steps = [values_at(cfg, 5, tokens, 1000)[0] for tokens in range(1001)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("shape", "start", "middle", "last"),
    [("constant", 2.0, 2.0, 2.0), ("linear", 8.0, 5.0, 2.0), ("cosine", 8.0, 5.0, 2.0)],
)
def test_a_phase_takes_its_shape_and_ends_at_its_value(
    shape: str, start: float, middle: float, last: float
):
    phases = (Phase(0, 1000, 2.0, shape),)
    values = [value_at(8.0, phases, tokens) for tokens in (0, 500, 1000, 10**9)]
    assert values == pytest.approx([start, middle, last, last], rel=1e-15)
    quarter = {"constant": 2.0, "linear": 6.5, "cosine": 8 - 3 * (1 - math.sqrt(0.5))}[shape]
    assert value_at(8.0, phases, 250) == pytest.approx(quarter, rel=1e-15)


def test_a_phase_starts_where_the_one_before_ended():
    phases = (Phase(0, 10, 4.0, "linear"), Phase(10, 20, 1.0), Phase(20, 30, 3.0, "linear"))
    values = [value_at(8.0, phases, tokens) for tokens in (0, 9, 10, 19, 20, 25, 29, 30)]
    assert values == pytest.approx([8.0, 4.4, 1.0, 1.0, 1.0, 2.0, 2.8, 3.0], rel=1e-15)


def test_rows_of_a_ramp_add_up_as_step_by_step():
    """Stairs whose ends lie within a step, one that a step jumps over, and one after another."""
    stairs = (Phase(0, 95, 2), Phase(95, 120, 4), Phase(120, 125, 6), Phase(125, 700, 8))
    cfg = run_of(rows=16, rows_phases=stairs)
    rows, sizes = 0, []
    for step in range(40):
        assert rows_after(cfg, 0, step) == rows
        assert rows_after(cfg, rows, 40 - step) == rows_after(cfg, 0, 40)
        sizes.append(rows_at(cfg, rows * 10))
        rows += sizes[-1]
    # 95 tokens are 9.5 rows: the fifth step of 2 rows starts at 8 rows and passes them.
    assert sizes[:12] == [2, 2, 2, 2, 2, 4, 8, 8, 8, 8, 8, 8]
    assert sizes[-1] == 16


def test_without_a_ramp_every_step_has_the_same_rows():
    assert rows_after(run_of(rows=3), 5, 7) == 5 + 21


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 4_300 * B // 2, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (14_300 * B, 2.2e-5),
        (14_633 * B - 1, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_800 * B, 7.3e-6),
    ],
)
def test_the_learning_rate_follows_the_report_to_the_token(
    report: RunConfig, tokens: int, rate: float
):
    """Report 4.2: 2.2e-4 until 10T, cosine to 2.2e-5 over 4.3T, 333B at that, 167B at 7.3e-6."""
    found = values_at(report, 10**6, tokens, 0).learning_rate
    assert found == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "speed", "weight", "rows"),
    [
        (0, 1e-3, 0.3, 3072),
        (469 * B - 1, 1e-3, 0.3, 13824),
        (469 * B, 1e-3, 0.3, 15360),
        (10 * T - 1, 1e-3, 0.3, 15360),
        (10 * T, 1e-3, 0.1, 15360),
        (14_300 * B - 1, 1e-3, 0.1, 15360),
        (14_300 * B, 0.0, 0.1, 15360),
        (14_800 * B, 0.0, 0.1, 15360),
    ],
)
def test_gamma_lambda_and_batch_follow_the_report_to_the_token(
    report: RunConfig, tokens: int, speed: float, weight: float, rows: int
):
    assert values_at(report, 10**6, tokens, 0)[1:] == (speed, weight, rows)


def test_the_reports_ramp_is_a_staircase_of_equal_tokens(report: RunConfig):
    ends = [469 * B * (i + 1) // 8 for i in range(8)]
    assert [phase.end for phase in report.schedule.rows_phases] == ends
    for i, end in enumerate(ends):
        assert rows_at(report, end - 1) == 3072 + 1536 * i
        assert rows_at(report, end) == 3072 + 1536 * (i + 1)


def test_the_reports_steps_are_the_fewest_that_reach_its_tokens(report: RunConfig):
    rows = [rows_after(report, 0, report.train.steps - back) for back in (0, 1)]
    assert rows[1] * 4096 < 14_800 * B <= rows[0] * 4096


def test_the_reports_learning_rate_warms_up_over_2000_steps_and_never_jumps_up(report: RunConfig):
    def rate(step: int, tokens: int = 0) -> float:
        return values_at(report, step, tokens, 0).learning_rate

    assert rate(0) == pytest.approx(2.2e-4 / 2000, rel=1e-15)
    assert rate(1998) < rate(1999) == 2.2e-4
    later = [rate(2000, share * T // 100) for share in range(1481)]
    assert later == sorted(later, reverse=True)
