"""What is called a spike, and that it depends on the losses alone, not on interruptions."""

import math

import numpy as np
import pytest

from dsv3_jax.config import TrainConfig
from dsv3_jax.train.trouble import WARM_UP, SpikeMeter, said_of

SKIP = TrainConfig(spike="skip", spike_deviations=4.0)


def losses(count: int) -> list[float]:
    return list(3 + 0.1 * np.random.default_rng(0).standard_normal(count))


def limits(meter: SpikeMeter, values: list[float], first: int = 1) -> list[float]:
    """The limit of every step, asked for before the loss of the step before is known."""
    found = []
    for step, loss in enumerate(values, start=first):
        found.append(meter.limit(step))
        if step > first:
            meter.add(step - 1, values[step - 1 - first])
        del loss
    meter.add(first + len(values) - 1, values[-1])
    return found


def test_nothing_is_a_spike_before_enough_losses_or_when_switched_off():
    found = limits(SpikeMeter(SKIP), losses(200))
    assert all(map(math.isinf, found[: WARM_UP + 1]))
    assert all(map(math.isfinite, found[WARM_UP + 1 :]))
    assert all(map(math.isinf, limits(SpikeMeter(TrainConfig()), losses(200))))


def test_the_limit_lies_that_many_deviations_above_the_recent_mean():
    values = losses(101)
    meter = SpikeMeter(SKIP)
    limits(meter, values)
    seen = np.array(values[:100])  # that of step 101 is the newest, of no effect on step 102
    assert meter.limit(102) == pytest.approx(seen.mean() + 4 * seen.std(), rel=1e-9)


def test_old_losses_are_forgotten():
    meter = SpikeMeter(SKIP)
    limits(meter, [9.0] * 100 + [1.0] * 2000)
    assert meter.limit(2102) == pytest.approx(1.0, abs=1e-2)


def test_an_interrupted_meter_goes_on_as_if_nothing_had_happened():
    """Stopped after 70 steps, its last loss known before the next limit is asked for."""
    values = losses(120)
    whole = limits(SpikeMeter(SKIP), values)
    first = SpikeMeter(SKIP)
    head = limits(first, values[:70])
    tail = limits(SpikeMeter(SKIP, first.state), values[70:], first=71)
    assert head + tail == whole


def test_a_skipped_update_is_one_line_with_rows_and_documents():
    names = ["a.py", "b.py", "c.py", "d.py", "e.py"]
    said = said_of(7, math.nan, [12, 13], names, 4, spike=False)
    assert said == (
        "update 7: main loss nan, gradient not finite in rows 12, 13 of the data "
        "(a.py, b.py, c.py and 2 more)"
    )
    assert said_of(7, 9.5, [], [], 4, spike=True) == "update 7: a main loss of 9.5000 is a spike"
    assert said_of(7, 9.5, [], [], 4, spike=False).endswith("not finite in no single row")
    assert said_of(7, 9.5, [1, 2], names, 2, spike=False).endswith("not finite in all rows")
