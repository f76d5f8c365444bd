"""Slots are filled and summed up as NumPy does it, copy by copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel import copies as made
from dsv3_jax.parallel.copies import running_count
from tests.shapes import compiled

R, J, S, D = 7, 3, 12, 4
# Each a program of one piece: their operations one by one are some hundred to compile.
in_slots = compiled(made.in_slots, static_argnums=1, static_argnames="complete")
fill_slots, fill_values, sum_copies, values_of_copies = map(
    compiled, (made.fill_slots, made.fill_values, made.sum_copies, made.values_of_copies)
)


@pytest.fixture
def slots() -> np.ndarray:
    """Of 21 copies nine have a slot, in no order; slots 1, 5 and 10 stay empty."""
    draw = np.random.default_rng(0)
    slot_RJ = np.full(R * J, S, np.int32)
    slot_RJ[draw.permutation(R * J)[:9]] = draw.permutation([0, 2, 3, 4, 6, 7, 8, 9, 11])
    return slot_RJ.reshape(R, J)


def test_slots_are_filled_and_summed_copy_by_copy(slots: np.ndarray):
    draw = np.random.default_rng(1)
    x_RD, y_SD, v_RJ = draw.random((R, D)), draw.random((S, D)), draw.random((R, J))
    copies = in_slots(jnp.asarray(slots), S)
    filled, values = np.zeros((S, D)), np.zeros(S)
    summed, back = np.zeros((R, D)), np.zeros((R, J))
    for r, j in np.ndindex(R, J):
        if slots[r, j] < S:
            filled[slots[r, j]], values[slots[r, j]] = x_RD[r], v_RJ[r, j]
            summed[r] += y_SD[slots[r, j]]
            back[r, j] = y_SD[slots[r, j], 0]
    np.testing.assert_allclose(fill_slots(jnp.asarray(x_RD), copies), filled, rtol=1e-6)
    np.testing.assert_allclose(fill_values(jnp.asarray(v_RJ), copies), values, rtol=1e-6)
    np.testing.assert_allclose(sum_copies(jnp.asarray(y_SD), copies), summed, rtol=1e-6)
    np.testing.assert_allclose(values_of_copies(jnp.asarray(y_SD[:, 0]), copies), back, rtol=1e-6)


def test_nothing_in_an_empty_slot_is_read(slots: np.ndarray):
    copies = in_slots(jnp.asarray(slots), S)
    y_SD = np.ones((S, D), np.float32)
    y_SD[[1, 5, 10]] = np.nan
    assert np.isfinite(sum_copies(jnp.asarray(y_SD), copies)).all()


def test_sums_are_at_least_float32():
    slot_RJ = jnp.arange(300, dtype=jnp.int32)[None]
    copies = in_slots(slot_RJ, 300, complete=True)
    assert sum_copies(jnp.ones((300, 1), jnp.bfloat16), copies) == 300  # bfloat16 stops at 256
    assert fill_slots(jnp.ones((1, 2), jnp.bfloat16), copies).dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_running_counts_are_numpys(size: int):
    chosen = np.random.default_rng(size).random((size, 3)) < 0.5
    np.testing.assert_array_equal(compiled(running_count)(chosen), chosen.cumsum(0))
    assert jax.eval_shape(running_count, jnp.asarray(chosen)).dtype == jnp.int32
