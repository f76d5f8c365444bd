"""Rows on the wire: as the recipe rounds them, in as many bytes as are told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.wire import PLAIN, pack, row_bytes, unpack, wire_of, wire_of_rules
from dsv3_jax.quant.recipes import RECIPES
from tests.shapes import compiled, normal

FP8 = wire_of_rules(RECIPES["fp8"]["dispatched"], RECIPES["fp8"]["expert_after_swiglu"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [256, 200, 5])
def test_what_comes_is_what_the_recipe_makes_of_it(width: int, dtype):
    """To the bit, and to round it once more changes nothing."""
    x_RD = np.asarray(normal(0, 7, width)) * 10.0 ** np.asarray(normal(1, 7, 1))
    x_RD[3] = 0
    x_RD = jnp.asarray(x_RD, dtype)
    packed = compiled(lambda x: pack(x, FP8.there))(x_RD)
    found = compiled(lambda packed: unpack(packed, FP8.there, dtype))(packed)
    wanted = compiled(lambda x: x.dequantize(dtype))(compiled(FP8.there.quantize)(x_RD))
    np.testing.assert_array_equal(np.float32(found), np.float32(wanted))
    again = compiled(FP8.there.fake_quantize)(found[None])[0]
    np.testing.assert_array_equal(again, np.float32(found))
    assert sum(part.nbytes for part in packed) == 7 * row_bytes(FP8.there, width, 2)


def test_a_row_of_zero_bytes_is_one_of_zeros():
    packed = jax.eval_shape(lambda x: pack(x, FP8.there), normal(0, 2, 256))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), packed)
    assert not compiled(lambda x: unpack(x, FP8.there, jnp.float32))(empty).any()


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
