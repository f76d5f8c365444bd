"""Linear and grouped linear against einsum and its derivative; dtypes of all they return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quant.gemm import JOINING_ROWS, grouped_linear, linear
from dsv3_jax.quant.wide import wide, wide_einsum
from tests.jaxprs import equations
from tests.shapes import compiled, normal
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close

D, F, E = 5, 7, 4


def value_and_gradients(function, *args) -> tuple:
    def run(x, w, dy):
        y, pull = jax.vjp(function, x, w)
        return y, pull(dy)

    return compiled(run)(*args)


def grouped_by_loop(x_XD, w_EDF, expert_x):
    """`grouped_linear` one block at a time."""
    blocks = jnp.split(x_XD, len(expert_x))
    return jnp.concatenate([x @ w_EDF[int(e)] for x, e in zip(blocks, expert_x, strict=True)])


@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (2, 2, 3)])
def test_linear_equals_einsum(x64, strict_dtypes, leading: tuple[int, ...]):
    args = normal(0, *leading, D), normal(1, D, F), normal(2, *leading, F)
    expected = value_and_gradients(lambda x, w: jnp.einsum("...d,df->...f", x, w), *args)
    assert_close(value_and_gradients(linear, *args), expected, FLOAT64)


@pytest.mark.parametrize(
    ("experts", "rows"),
    [([0, 1, 2, 3], 3), ([0, 0, 2, 2, 2], 2), ([3, 1, 3, 0], 1), ([1], 4)],
    ids=["each once", "some never", "unsorted", "one block"],
)
def test_grouped_linear_equals_a_loop_over_blocks(x64, strict_dtypes, experts, rows: int):
    expert_x, size = jnp.asarray(experts, jnp.int32), len(experts) * rows
    args = normal(0, size, D), normal(1, E, D, F), normal(2, size, F)
    expected = value_and_gradients(lambda x, w: grouped_by_loop(x, w, experts), *args)
    actual = value_and_gradients(lambda x, w: grouped_linear(x, expert_x, w), *args)
    assert_close(actual, expected, FLOAT64)


@pytest.mark.parametrize("rows", [1, 3, JOINING_ROWS])
@pytest.mark.parametrize("grouped", [False, True])
def test_weights_side_by_side_are_products_side_by_side(x64, strict_dtypes, grouped, rows: int):
    """Outputs and gradients, below and from the number of rows from which weights are joined."""
    expert_x = jnp.asarray([2, 0, 2], jnp.int32)
    lead = (E,) if grouped else ()
    x, dy = normal(0, 3 * rows, D), normal(1, 3 * rows, F + 2)
    pair = normal(2, *lead, D, F), normal(3, *lead, D, 2)

    def product(x, *weights):
        return grouped_linear(x, expert_x, *weights) if grouped else linear(x, *weights)

    expected = value_and_gradients(
        lambda x, pair: jnp.concatenate([product(x, w) for w in pair], -1), x, pair, dy
    )
    assert_close(
        value_and_gradients(lambda x, pair: product(x, *pair), x, pair, dy), expected, FLOAT64
    )


def _linear_case():
    return linear, normal(0, 300, D), normal(1, D, F), normal(2, 300, F)


def _grouped_case():
    expert_x = jnp.asarray([1, 0, 1], jnp.int32)
    return (
        lambda x, w: grouped_linear(x, expert_x, w),
        normal(0, 300, D),
        normal(1, 2, D, F),
        normal(2, 300, F),
    )


@pytest.mark.parametrize("case", [_linear_case, _grouped_case])
def test_gradients_of_wider_weights_are_never_rounded_to_the_activations_dtype(strict_dtypes, case):
    """float32 masters under bfloat16 activations: dw is the float32 sum of bfloat16 products."""
    function, x, w, dy = case()
    x, w, dy = x.astype(jnp.bfloat16), w.astype(jnp.float32), dy.astype(jnp.bfloat16)
    y, (dx, dw) = value_and_gradients(function, x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert (dw != dw.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    widened = x.astype(jnp.float32), w, dy.astype(jnp.float32)
    _, (_, exact) = value_and_gradients(function, *widened)
    assert_close(dw, exact, FLOAT32)


@pytest.mark.parametrize("case", [_linear_case, _grouped_case])
def test_products_are_rounded_once_at_the_end(strict_dtypes, case):
    """In bfloat16: the exact product of the rounded operands, to half a unit of the last place."""
    function, x, w, _ = case()
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.float32)
    exact = compiled(function)(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w)))
    actual = compiled(function)(x, w).astype(jnp.float32)
    np.testing.assert_allclose(actual, exact, rtol=2.0**-8 * 1.01, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_accumulation_is_at_least_float32(x64, dtype: str, expected: str):
    a = jnp.ones((2, 2), dtype)
    assert wide(a.dtype) == wide_einsum("ij,jk->ik", a, a).dtype == jnp.dtype(expected)


@pytest.mark.parametrize(("dtype", "multiplied"), [(jnp.bfloat16, 2), (jnp.float32, 1)])
def test_one_row_of_bfloat16_is_multiplied_as_two_and_is_the_same(dtype, multiplied: int):
    x_XD, w_DF = normal(0, 1, 24, dtype=dtype), normal(1, 24, 16, dtype=dtype)
    (dot,) = (eqn for eqn in equations(linear, x_XD, w_DF) if eqn.primitive.name == "dot_general")
    assert dot.outvars[0].aval.shape == (multiplied, 16)
    y_XF = linear(x_XD, w_DF)
    assert y_XF.shape == (1, 16)
    assert_close(y_XF, linear(jnp.concatenate([x_XD] * 3), w_DF)[:1], BFLOAT16)
