"""Rows on the wire: as the recipe rounds them, in as many bytes as are told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.wire import PLAIN, pack, row_bytes, unpack, wire_of, wire_of_rules
from dsv3_jax.quant.recipes import RECIPES
from tests.shapes import normal

FP8 = wire_of_rules(RECIPES["fp8"]["dispatched"], RECIPES["fp8"]["expert_after_swiglu"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [256, 200, 5])
def test_what_comes_is_what_the_recipe_makes_of_it(width: int, dtype):
    """To the bit, and to round it once more changes nothing."""
    x_RD = (normal(0, 7, width) * 10.0 ** normal(1, 7, 1)).astype(dtype)
    x_RD = x_RD.at[3].set(0)
    packed = pack(x_RD, FP8.there)
    found = unpack(packed, FP8.there, dtype)
    wanted = FP8.there.quantize(x_RD).dequantize(dtype)
    np.testing.assert_array_equal(np.float32(found), np.float32(wanted))
    again = FP8.there.fake_quantize(found[None])[0]
    np.testing.assert_array_equal(again, np.float32(found))
    assert sum(part.nbytes for part in packed) == 7 * row_bytes(FP8.there, width, 2)


def test_a_row_of_zero_bytes_is_one_of_zeros():
    empty = jax.tree.map(jnp.zeros_like, pack(normal(0, 2, 256), FP8.there))
    assert not unpack(empty, FP8.there, jnp.float32).any()


def test_rows_without_an_operand_stay_as_they_are():
    x_RD = normal(0, 3, 5)
    assert pack(x_RD, None) is x_RD
    assert unpack(x_RD, None, jnp.float32) is x_RD
    assert row_bytes(None, 5, 4) * 3 == x_RD.nbytes


def test_only_what_is_lossless_at_its_destination_travels_in_fp8():
    up, down = RECIPES["fp8"]["dispatched"], RECIPES["fp8"]["expert_after_swiglu"]
    assert (up.input, down.grad_output) == FP8
    assert wire_of(jnp.ones(1), jnp.ones(1)) == PLAIN
    per_tensor = RECIPES["fp8_per_tensor"]["dispatched"]
    assert wire_of_rules(per_tensor, per_tensor) == PLAIN
    for change in ({"fmt": "e5m2"}, {"scale": "float32"}, {"block": (128, 128)}):
        other = replace(up, input=replace(up.input, **change))
        assert wire_of_rules(other, down) == (None, down.grad_output)
