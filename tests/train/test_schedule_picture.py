"""The picture's points are the schedule's own values, at every border and through a batch ramp."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig, ModelConfig, Phase, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.train.schedule_picture import TITLES, draw_schedules, planned_updates, stairs
from dsv3_jax.train.schedules import rows_after, values_at

T = 10**12


def ramp(first: int, last: int, tokens: int, parts: int) -> tuple[Phase, ...]:
    """A batch that grows in equal parts."""
    ends = [tokens * (part + 1) // parts for part in range(parts)]
    rows = [first + (last - first) * part // parts for part in range(parts)]
    return tuple(map(Phase, [0, *ends[:-1]], ends, map(float, rows)))


SMALL = RunConfig(
    model=ModelConfig(max_length=64),
    data=DataConfig(length=10),
    train=TrainConfig(steps=3000, rows=16, microbatches=16),
    schedule=ScheduleConfig(
        learning_rate=1.0,
        warmup_steps=7,
        learning_rate_phases=(Phase(0, 90_001, 1.0), Phase(90_001, 200_000, 0.1, "cosine")),
        bias_speed_phases=(Phase(0, 123_457, 1e-3), Phase(123_457, 300_000, 0.0)),
        mtp_weight_phases=(Phase(0, 77, 0.3), Phase(77, 200_000, 0.1)),
        rows_phases=ramp(3, 16, 54_321, 13),
    ),
)
LARGE = RunConfig(
    train=TrainConfig(steps=240_000, rows=15360, microbatches=80),
    schedule=ScheduleConfig(
        learning_rate_phases=(
            Phase(0, 10 * T, 2.2e-4),
            Phase(10 * T, 14_300 * 10**9, 2.2e-5, "cosine"),
            Phase(14_300 * 10**9, 14_633 * 10**9, 2.2e-5),
            Phase(14_633 * 10**9, 14_800 * 10**9, 7.3e-6),
        ),
        bias_speed_phases=(
            Phase(0, 14_300 * 10**9, 1e-3),
            Phase(14_300 * 10**9, 14_800 * 10**9, 0.0),
        ),
        mtp_weight_phases=(Phase(0, 10 * T, 0.3), Phase(10 * T, 14_800 * 10**9, 0.1)),
        rows_phases=ramp(3072, 15360, 469 * 10**9, 64),
    ),
)


def every_update(cfg: RunConfig) -> list[tuple]:
    """The slow twin: all updates one after the other, counting tokens as a loop would."""
    total = rows_after(cfg, 0, cfg.train.steps) * cfg.data.length
    tokens, updates = 0, []
    for step in range(cfg.train.steps):
        values = values_at(cfg, step, tokens, total)
        updates.append((step, tokens, tokens + values.rows * cfg.data.length, values))
        tokens = updates[-1][2]
    return updates


def test_chosen_updates_are_those_of_the_loop_through_the_ramp():
    whole, chosen = every_update(SMALL), planned_updates(SMALL)
    assert len(chosen) < len(whole)
    assert [whole[update.step] for update in chosen] == [tuple(update) for update in chosen]
    assert (chosen[0].step, chosen[-1].step) == (0, SMALL.train.steps - 1)


def test_every_jump_is_drawn_from_both_sides_at_its_token():
    whole = every_update(SMALL)
    chosen = {update.step for update in planned_updates(SMALL)}
    jumps = {
        after[0]
        for before, after in pairwise(whole)
        for name in ("rows", "bias_speed", "mtp_weight")
        if getattr(before[3], name) != getattr(after[3], name)
    }
    assert len(jumps) == 15  # 13 of the batch, one of gamma, one of lambda
    assert jumps <= chosen
    assert {step - 1 for step in jumps} <= chosen
    tokens, values = stairs(planned_updates(SMALL), "bias_speed")
    border = next(begin for _, begin, _, v in whole if v.bias_speed == 0.0)
    at_border = [v for place, v in zip(tokens, values, strict=True) if place == border]
    assert at_border == [1e-3, 0.0]


def test_the_line_is_the_schedule_between_chosen_updates_too():
    """A straight line between the points misses no value by more than 0.1% of the highest."""
    import numpy as np

    whole, chosen = every_update(SMALL), planned_updates(SMALL)
    for name in TITLES:
        tokens, values = stairs(chosen, name)
        highest = max(values)
        for step, begin, end, exact in whole[::7]:
            middle = np.interp((begin + end) / 2, tokens, values)
            assert middle == pytest.approx(getattr(exact, name), abs=1e-3 * highest), (name, step)


def test_warm_up_is_drawn_step_by_step_where_it_is_short():
    steps = {update.step for update in planned_updates(SMALL)}
    assert set(range(8)) <= steps


def test_the_plan_of_671b_is_exact_and_quick_to_draw(tmp_path: Path):
    begin = time.process_time()
    draw_schedules(LARGE, tmp_path / "a.png")
    assert time.process_time() - begin < 3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    chosen = planned_updates(LARGE)
    for border, name, before, after in (
        (10 * T, "mtp_weight", 0.3, 0.1),
        (14_300 * 10**9, "bias_speed", 1e-3, 0.0),
    ):
        last = max((u for u in chosen if u.begin < border), key=lambda u: u.begin)
        first = min((u for u in chosen if u.begin >= border), key=lambda u: u.begin)
        assert last.end == first.begin
        assert (getattr(last.values, name), getattr(first.values, name)) == (before, after)


EDGES = {
    "one_step": RunConfig(train=TrainConfig(steps=1)),
    "no_warm_up": RunConfig(train=TrainConfig(steps=3), schedule=ScheduleConfig(warmup_steps=0)),
    "ends_in_the_ramp": replace(SMALL, train=replace(SMALL.train, steps=5)),
}


@pytest.mark.parametrize("cfg", EDGES.values(), ids=EDGES)
def test_short_plans_are_complete(cfg: RunConfig):
    assert [tuple(update) for update in planned_updates(cfg)] == every_update(cfg)


def test_a_plan_of_zeros_in_one_step_can_be_drawn(tmp_path: Path):
    zeros = ScheduleConfig(
        learning_rate=0.0, final_learning_rate=0.0, bias_speed=0.0, mtp_weight=0.0
    )
    draw_schedules(RunConfig(train=TrainConfig(steps=1), schedule=zeros), tmp_path / "a.svg")
    assert "nan" not in (tmp_path / "a.svg").read_text().lower()
