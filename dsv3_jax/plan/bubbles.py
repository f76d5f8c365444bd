"""What schedules cost in closed form: idle time, parameters, activations (report Table 2).

With P ranks, N micro-batches and the times F, B, W of a chunk's operations, FB of a fused pair. The
formulas hold for times as even as the condition beside each says; the simulator takes any.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_jax.parallel.schedules import NAMES


@dataclass(frozen=True)
class Formula:
    """One schedule's row of the table."""

    text: str
    """The bubble, as the report writes it, in ranks"""
    holds: str
    """For which times and sizes the simulated bubble is that one; empty for all"""
    live: str
    """Residual sets that the fullest rank holds at once"""
    stages_on_rank: int
    """Parts of the model on each rank"""
    bubble: Callable[[int, float, float, float, float], float]
    """Of ranks, F, B, W, FB: idle time of the rank that idles most"""
    peak: Callable[[int, int], int]
    """Of ranks and micro-batches: the number of live sets"""


EVEN_PAIRS = "B − W = F ≥ W, B ≤ FB ≤ F + B"
FORMULAS = {
    "gpipe": Formula(
        text="(P − 1)(F + B)",
        holds="",
        live="N",
        stages_on_rank=1,
        bubble=lambda P, F, B, W, FB: (P - 1) * (F + B),
        peak=lambda P, N: N,
    ),
    "1f1b": Formula(
        text="(P − 1)(F + B)",
        holds="",
        live="min(P, N)",
        stages_on_rank=1,
        bubble=lambda P, F, B, W, FB: (P - 1) * (F + B),
        peak=lambda P, N: min(P, N),
    ),
    "zb1p": Formula(
        text="(P − 1)(F + B − 2W)",
        holds="W ≤ F, W ≤ B − W, N ≥ P",
        live="min(P, N)",
        stages_on_rank=1,
        bubble=lambda P, F, B, W, FB: (P - 1) * (F + B - 2 * W),
        peak=lambda P, N: min(P, N),
    ),
    "dualpipe": Formula(
        text="(P/2 − 1)(FB + B − 3W)",
        holds=EVEN_PAIRS,
        live="P + 1",
        stages_on_rank=2,
        bubble=lambda P, F, B, W, FB: (P / 2 - 1) * (FB + B - 3 * W),
        peak=lambda P, N: P + 1,
    ),
    "dualpipev": Formula(  # the row above, of 2P stages
        text="(P − 1)(FB + B − 3W)",
        holds=EVEN_PAIRS,
        live="2P + 1",
        stages_on_rank=2,
        bubble=lambda P, F, B, W, FB: (P - 1) * (FB + B - 3 * W),
        peak=lambda P, N: 2 * P + 1,
    ),
}
assert tuple(FORMULAS) == NAMES
