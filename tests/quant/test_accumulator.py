"""The emulated accumulator against whole numbers in Python, and against exact sums."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quant.accumulator import Accumulator, emulated_matmul, emulated_product
from dsv3_jax.quant.fp8 import fake_quantize, quantize
from tests.shapes import compiled, normal

emulated = compiled(emulated_matmul, static_argnums=2)


def cut(x: Fraction, largest: Fraction, bits: int) -> Fraction:
    if not largest:
        return Fraction(0)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= largest:
        exponent += 1
    while Fraction(2) ** exponent > largest:
        exponent -= 1
    place = Fraction(2) ** (exponent - bits + 1)
    return int(x / place) * place  # int() cuts towards 0


def by_hand(a: np.ndarray, b: np.ndarray, acc: Accumulator) -> float:
    """One output, product by product."""
    products = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    total, register, seen = 0.0, Fraction(0), 0
    for start in range(0, len(products), acc.group):
        group = products[start : start + acc.group]
        largest = max(abs(p) for p in group)
        largest = max(largest, abs(register)) if acc.aligned else largest
        added = sum(cut(p, largest, acc.bits) for p in group)
        added += cut(register, largest, acc.bits) if acc.aligned else register
        register = cut(added, abs(added), acc.bits)
        seen += acc.group
        if (acc.interval and seen % acc.interval == 0) or start + acc.group >= len(products):
            total = np.float32(total) + np.float32(float(register))
            register = Fraction(0)
    return float(total)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("bits", "group", "interval"), [(14, 32, 128), (6, 4, 8), (9, 8, None)])
def test_the_emulation_is_the_sum_by_hand(bits, group, interval, aligned: bool):
    acc = Accumulator(bits, group, interval, aligned)
    rounded = compiled(lambda x: fake_quantize(x, (3, 300)))
    a, b = (np.asarray(rounded(normal(i, 3, 300))) for i in range(2))
    actual = np.asarray(emulated(a, b.T, acc))
    expected = [[by_hand(row, column, acc) for column in b] for row in a]
    assert np.array_equal(actual, np.array(expected, np.float32))


def test_the_first_bits_alone_are_kept():
    """1 + 2^-13 fits in 14 bits, 1 + 2^-14 does not; of -2^-14 nothing is left either."""
    a = jnp.asarray([[1.0, 2.0**-13], [1.0, 2.0**-14], [1.0, -(2.0**-14)]], jnp.float32)
    sums = emulated(a, jnp.ones((2, 1)), Accumulator(group=2, interval=None))
    assert sums[:, 0].tolist() == [1 + 2.0**-13, 1.0, 1.0]


def test_promotion_keeps_what_the_register_would_lose():
    a = jnp.ones((1, 2**15), jnp.float32)
    b = jnp.ones((2**15, 1), jnp.float32)
    stuck = emulated(a * 1.25, b, Accumulator(interval=None))[0, 0]
    assert emulated(a * 1.25, b, Accumulator())[0, 0] == 1.25 * 2**15
    assert stuck < 1.25 * 2**15


def test_blocks_are_scaled_when_they_are_promoted():
    """With enough bits it is the product of the expanded operands."""
    quantized = compiled(quantize, static_argnames="block")
    a = quantized(normal(0, 5, 300))
    b = quantized(normal(1, 300, 7), block=(128, 128))
    expanded = compiled(lambda *blocked: [x.dequantize() for x in blocked])(a, b)
    wide_a, wide_b = (np.asarray(x, float) for x in expanded)
    exact = wide_a @ wide_b
    run = compiled(emulated_product, static_argnums=2)
    size = np.abs(wide_a) @ np.abs(wide_b)
    fine = np.abs(np.asarray(run(a, b, Accumulator(bits=18))) - exact)
    coarse = np.abs(np.asarray(run(a, b, Accumulator(bits=8))) - exact)
    assert (fine <= 2.0**-17 * size).all()
    assert coarse.max() > 100 * fine.max()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"bits": 0}, "bits is 0; allowed: 1 to 18 for group = 32"),
        ({"bits": 19}, "bits is 19; allowed: 1 to 18 for group = 32"),
        ({"group": -1}, "group is -1; allowed: at least 1"),
        ({"interval": 0}, "interval is 0; allowed: multiples of group = 32, or None"),
        ({"interval": 100}, "interval is 100; allowed: multiples of group = 32"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Accumulator(**sizes)


def test_blocks_that_do_not_meet_are_refused():
    blocked = (((2, 4), (1, 4)), ((4, 2), (2, 2)))
    a, b = (jax.eval_shape(partial(quantize, block=b), jnp.ones(s)) for s, b in blocked)
    with pytest.raises(ValueError, match=r"blocks are \(1, 4\) and \(2, 2\)"):
        emulated_product(a, b, Accumulator())
