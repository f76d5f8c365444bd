"""Values over a run: the learning rate counts steps in its warm-up, all else consumed tokens (4.2).

A value holds for the update that consumes the next rows, so a phase that begins at `n` tokens is in
force for the first update after `n` tokens.
"""

import math
from typing import NamedTuple

from dsv3_jax.config import Phase, RunConfig
from dsv3_jax.config.stairs import stairs


class Values(NamedTuple):
    """What the schedules say of one update."""

    learning_rate: float
    bias_speed: float
    mtp_weight: float
    rows: int


def values_at(cfg: RunConfig, step: int, tokens: int, total_tokens: int) -> Values:
    """For the update after `step` done updates and `tokens` consumed tokens.

    `total_tokens` of the whole run, where the cosine without phases ends. The first update of a
    warm-up is not 0.
    """
    schedule = cfg.schedule
    warm = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    cosine = Phase(0, max(total_tokens, 1), schedule.final_learning_rate, "cosine")
    phases = schedule.learning_rate_phases or (cosine,)
    return Values(
        warm * value_at(schedule.learning_rate, phases, tokens),
        value_at(schedule.bias_speed, schedule.bias_speed_phases, tokens),
        value_at(schedule.mtp_weight, schedule.mtp_weight_phases, tokens),
        rows_at(cfg, tokens),
    )


def never_reached(cfg: RunConfig) -> list[str]:
    """A line for each list of phases of which some begin after the run's last token."""
    total = rows_after(cfg, 0, cfg.train.steps) * cfg.data.length
    lines = []
    for name in ("learning_rate", "bias_speed", "mtp_weight", "rows"):
        phases = getattr(cfg.schedule, f"{name}_phases")
        late = sum(phase.begin >= total for phase in phases)
        if late:
            lines.append(
                f"{late} of {len(phases)} schedule.{name}_phases begin after the run's end at "
                f"{total:,} tokens"
            )
    return lines


def rows_at(cfg: RunConfig, tokens: int) -> int:
    """Rows of the step after `tokens` consumed tokens: `train.rows` after the last phase."""
    for phase in cfg.schedule.rows_phases:
        if tokens < phase.end:
            return int(phase.value)
    return cfg.train.rows


def rows_after(cfg: RunConfig, consumed_rows: int, steps: int) -> int:
    """Consumed rows after `steps` more steps."""
    return consumed_rows + sum(rows * n for rows, n in stairs(cfg, consumed_rows, steps))


def steps_of(cfg: RunConfig, rows: int) -> int:
    """Fewest steps of a run that consume so many rows."""
    steps = 0
    for size, count in stairs(cfg, 0, rows):
        taken = min(count, -(-rows // size))
        steps, rows = steps + taken, rows - taken * size
        if rows <= 0:
            break
    return steps


def value_at(start: float, phases: tuple[Phase, ...], tokens: int) -> float:
    """Value after `tokens` tokens of phases that follow one another from `start`.

    The last value holds on.
    """
    for phase in phases:
        if tokens < phase.end:
            return _within(start, phase, (tokens - phase.begin) / (phase.end - phase.begin))
        start = phase.value
    return start


def _within(start: float, phase: Phase, share: float) -> float:
    if phase.shape == "constant":
        return phase.value
    if phase.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return start + (phase.value - start) * share
