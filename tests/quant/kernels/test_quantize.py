"""Kernels that quantise, interpreted: values and scales of the definition, bit for bit."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quant import fp8
from dsv3_jax.quant.kernels.quantize import (
    quantize_both,
    quantize_columns,
    quantize_rows,
    retile,
)
from dsv3_jax.quant.kernels.swiglu import swiglu_columns, swiglu_rows
from dsv3_jax.quant.kernels.weights import quantize_weight
from dsv3_jax.quant.swiglu import swiglu
from tests.quant.kernels.interpret import interpreted, lowered, needs_interpreter
from tests.shapes import normal

T, D = 256, 384
E4M3 = jnp.float8_e4m3fn
slow = pytest.mark.slow


def hard_cases(dtype) -> jax.Array:
    """[T, D] of many magnitudes, with tiles of zeros, of tiny and of subnormal numbers, and a few
    numbers that are none.
    """
    draw = np.random.default_rng(0)
    x = draw.standard_normal((T, D)) * 2.0 ** draw.integers(-9, 9, (T, D))
    x *= 2.0 ** draw.integers(-60, 60, (T, 1)) * 2.0 ** draw.integers(-40, 40, (1, D))
    x[5], x[:, 20], x[128:, 128:256] = 0, 0, 0
    x[6], x[:, 21] = x[6] * 2.0**-60, x[:, 21] * 2.0**-60
    x[7, :128] = 1e-40
    x[8, :128], x[128:, 300] = 2.0**-126, -(2.0**-126)
    x[3, 4], x[130, 200], x[130, 300] = np.inf, -np.inf, np.nan
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


@partial(jax.jit, static_argnames=("block", "scale", "prepare"))
def of_definition(
    *args, block: tuple[int, int], scale: str, prepare: Callable[..., jax.Array] = lambda x: x
) -> tuple:
    """Values and scales of `prepare(*args)`, transposed as kernels lay them out."""
    blocked = fp8.quantize(prepare(*args), block, scale=scale)
    values, scales = blocked.values, blocked.scales
    return (values, scales.T) if block[0] == 1 else (values.T, scales)


def assert_same(actual: tuple, expected: tuple) -> None:
    """Bit for bit, but that NaN is NaN of either sign."""
    for got, want in zip(actual, expected, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
        got, want = (jnp.where(jnp.isnan(x), 0, x) for x in (got, want))
        bits = f"uint{8 * got.dtype.itemsize}"
        np.testing.assert_array_equal(np.asarray(got).view(bits), np.asarray(want).view(bits))


def dequantized(q_TD: jax.Array, s_dT: jax.Array) -> jax.Array:
    return fp8.Blocked(q_TD, s_dT.T, (1, 128)).dequantize()


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "row_scale", "column_scale"),
    [
        (jnp.bfloat16, "float32", "pow2"),
        (jnp.float32, "pow2", "float32"),
        pytest.param(jnp.bfloat16, "pow2", "float32", marks=slow),
        pytest.param(jnp.float32, "float32", "pow2", marks=slow),
    ],
)
def test_both_tilings_are_the_definitions(dtype, row_scale: str, column_scale: str):
    x_TD = hard_cases(dtype)
    made = interpreted(lambda x_TD: quantize_both(x_TD, row_scale, column_scale), x_TD)
    assert_same(made[:2], of_definition(x_TD, block=(1, 128), scale=row_scale))
    assert_same(made[2:], of_definition(x_TD, block=(128, 1), scale=column_scale))


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float32, "float32"), pytest.param(jnp.bfloat16, "pow2", marks=slow)]
)
def test_weights_are_quantised_as_the_definition_does(dtype, scale: str):
    """Of two experts."""
    w_EDF = hard_cases(dtype).reshape(2, T // 2, D)
    made = interpreted(lambda w: quantize_weight(w, scale), w_EDF)
    expected = jax.jit(partial(fp8.quantize, block=(128, 128), scale=scale))(w_EDF)
    assert_same((made.values, made.scales), (expected.values, expected.scales))


@needs_interpreter
def test_rows_alone_are_the_definitions():
    x_TD = hard_cases(jnp.bfloat16)
    made = interpreted(lambda x_TD: quantize_rows(x_TD, "pow2"), x_TD)
    assert_same(made, of_definition(x_TD, block=(1, 128), scale="pow2"))


@needs_interpreter
@pytest.mark.parametrize("scale", ["float32", pytest.param("pow2", marks=slow)])
def test_retiling_what_was_kept_is_the_definitions(scale: str):
    kept = of_definition(hard_cases(jnp.bfloat16), block=(1, 128), scale=scale)
    made = interpreted(lambda q_TD, s_dT: retile(q_TD, s_dT, scale), *kept)
    assert_same(made, of_definition(*kept, block=(128, 1), scale=scale, prepare=dequantized))


@needs_interpreter
@pytest.mark.parametrize("scale", ["float32", pytest.param("pow2", marks=slow)])
def test_swiglu_is_quantised_as_its_output_would_be(scale: str):
    """With a routing gate, and of more than one tile."""
    x_TF2, gate_T1 = normal(1, T, 512, dtype=jnp.bfloat16), jnp.abs(normal(2, T, 1))
    made = interpreted(lambda x, gate: swiglu_rows(x, gate, scale), x_TF2, gate_T1)
    assert_same(made, of_definition(x_TF2, gate_T1, block=(1, 128), scale=scale, prepare=swiglu))


@needs_interpreter
def test_swiglu_of_what_was_kept_is_quantised_for_wgrad():
    x_TF2, gate_T1 = normal(1, 128, 512, dtype=jnp.bfloat16), jnp.abs(normal(2, 128, 1))
    kept = *of_definition(x_TF2, block=(1, 128), scale="pow2"), gate_T1
    made = interpreted(lambda q, s, gate: swiglu_columns(q, s, gate, "pow2"), *kept)
    expected = of_definition(
        *kept, block=(128, 1), scale="pow2", prepare=lambda q, s, g: swiglu(dequantized(q, s), g)
    )
    assert_same(made, expected)


@needs_interpreter
def test_columns_alone_are_those_of_both():
    x_TD = hard_cases(jnp.bfloat16)
    made = interpreted(lambda x_TD: quantize_columns(x_TD, "float32"), x_TD)
    assert_same(made, of_definition(x_TD, block=(128, 1), scale="float32"))


@needs_interpreter
@pytest.mark.parametrize(
    ("run", "dtype", "scales"),
    [
        (lambda x: quantize_both(x, "float32", "pow2"), jnp.bfloat16, 0),
        (lambda x: quantize_both(x, "pow2", "float32"), jnp.float32, 0),
        (lambda q, s: retile(q, s, "pow2"), E4M3, 4),
        (lambda x: swiglu_rows(x, None, "float32"), jnp.bfloat16, 0),
        (lambda q, s: swiglu_columns(q, s, None, "pow2"), E4M3, 4),
        (lambda w: quantize_weight(w, "float32"), jnp.float32, 0),
    ],
    ids=["both", "both_float32", "retile", "swiglu_rows", "swiglu_columns", "weight"],
)
def test_lowers_for_a_gpu(run, dtype, scales: int):
    args = [jax.ShapeDtypeStruct((256, 512), dtype)]
    args += [jax.ShapeDtypeStruct((scales, 256), jnp.float32)] if scales else []
    assert "mosaic_gpu" in lowered(run, *args)
