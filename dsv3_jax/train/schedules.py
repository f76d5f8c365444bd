"""Values over a run: the learning rate counts steps in its warm-up, then consumed tokens (4.2)."""

import math

from dsv3_jax.config import Phase, ScheduleConfig


def learning_rate(cfg: ScheduleConfig, step: int, tokens: int, total_tokens: int) -> float:
    """For the update after `step` done updates and `tokens` consumed tokens.

    The first update of a warm-up is not 0.
    """
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    phases = cfg.phases or (Phase(total_tokens, cfg.final_learning_rate, "cosine"),)
    return warm * value_at(cfg.learning_rate, phases, tokens)


def value_at(start: float, phases: tuple[Phase, ...], tokens: int) -> float:
    """Value after `tokens` tokens of phases that follow one another from `start`; the last value
    holds on.
    """
    for phase in phases:
        if tokens < phase.tokens:
            return _within(start, phase, tokens / phase.tokens)
        start, tokens = phase.value, tokens - phase.tokens
    return start


def _within(start: float, phase: Phase, share: float) -> float:
    if phase.shape == "constant":
        return phase.value
    if phase.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return start + (phase.value - start) * share
