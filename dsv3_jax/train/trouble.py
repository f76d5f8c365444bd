"""Updates that went wrong: losses that are not finite, and losses far above the recent ones
(report 4.2: no irrecoverable spike, no rollback; what it would have done is unpublished).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.cli import escaped
from dsv3_jax.config import TrainConfig

HORIZON = 100  # steps over which the mean and the deviation of the loss forget
WARM_UP = 50  # losses that must have been seen before any is called a spike


class BadSteps(RuntimeError):
    """Too many updates in a row were not finite; the message says which and what is kept."""


class NoBatch(OSError):
    """There is no next batch to learn from; one line says why. The weights are as good as before,
    so they are saved.
    """


class SpikeState(NamedTuple):
    """Statistics of the loss: how many were seen, their fading mean and variance, and the newest,
    which is not part of them yet.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    newest_step: int = 0
    newest: float | None = None


class SpikeMeter:
    """The loss above which an update is a spike.

    The limit of step n follows from the losses of steps up to n - 2, since that of n - 1 may not
    be known yet when step n starts. So it is the same however the run was interrupted.
    """

    def __init__(self, cfg: TrainConfig, state: Sequence[float] = ()) -> None:
        self._active, self._deviations = cfg.spike != "off", cfg.spike_deviations
        self.state = SpikeState(*state)

    def limit(self, step: int) -> float:
        """For the main loss of step `step`, counted from 1; infinite while there is none."""
        if self.state.newest is not None and self.state.newest_step <= step - 2:
            self.state = _with_newest_counted(self.state)
        if not self._active or self.state.count < WARM_UP:
            return math.inf
        return self.state.mean + self._deviations * math.sqrt(self.state.variance)

    def add(self, step: int, loss: float) -> None:
        """The main loss of an update that was made."""
        if self.state.newest is not None:
            self.state = _with_newest_counted(self.state)
        self.state = self.state._replace(newest_step=step, newest=loss)


def _with_newest_counted(state: SpikeState) -> SpikeState:
    """Exponentially fading mean and variance; plain ones until the horizon is full."""
    count = state.count + 1
    share = 1 / min(count, HORIZON)
    delta = state.newest - state.mean
    mean = state.mean + share * delta
    variance = (1 - share) * (state.variance + share * delta * delta)
    return SpikeState(count, mean, variance, state.newest_step)


def said_of(
    step: int, loss: float, rows: Sequence[int], names: Sequence[str], of: int, *, spike: bool
) -> str:
    """One line about an update that was not made: its step, its loss, rows (`of` so many) and their
    documents.
    """
    if spike:
        return f"update {step}: a main loss of {loss:.4f} is a spike"
    numbers = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    documents = ", ".join(map(escaped, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
    where = f"row{'s' * (len(rows) > 1)} {numbers} of the data ({documents})"
    if len(rows) in (0, of):
        where = "all rows" if rows else "no single row"
    return f"update {step}: main loss {loss:.4f}, gradient not finite in {where}"
