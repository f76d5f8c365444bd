"""GEMM kernels, interpreted, against products of the dequantised operands in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quant import fp8
from dsv3_jax.quant.fp8 import Blocked
from tests.quant.kernels.interpret import interpreted, lowered, needs_interpreter

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from dsv3_jax.quant.kernels.rows_gemm import _splits, multiply_rows
from dsv3_jax.quant.kernels.walk import Walk
from dsv3_jax.quant.kernels.wgrad_gemm import multiply_columns

SHARE = 2e-6  # of the largest sum of |a| |b|: float32's rounding of sums over a few hundred terms
EXPERTS = 3
FEW = Walk(2, multiprocessors=2)  # tiles are more than blocks of the grid
slow = pytest.mark.slow


def lumpy(seed: int, *shape: int) -> jax.Array:
    """Rows and columns of sizes from 2^-8 to 2^8, so that scales differ."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(shape) * 2.0 ** draw.integers(-8, 8, (*shape[:-1], 1))
    return jnp.asarray(x * 2.0 ** draw.integers(-4, 4, shape[-1]), jnp.float32)


def exact(x: Blocked) -> np.ndarray:
    return np.asarray(x.dequantize(), float)


def assert_products(actual: jax.Array, a: np.ndarray, b: np.ndarray) -> None:
    """actual = a b^T"""
    size = np.abs(a) @ np.abs(b).T
    assert (np.abs(np.asarray(actual, float) - a @ b.T) <= SHARE * size.max()).all()


def rows_and_weights(tokens: int, inner: int, columns: int) -> tuple[Blocked, Blocked]:
    a = fp8.quantize(lumpy(0, tokens, inner))
    return a, fp8.quantize(lumpy(1, EXPERTS, columns, inner), (128, 128))


def run_rows(a: Blocked, b: Blocked, expert_x: list[int], dtype=jnp.float32, walk: Walk = FEW):
    experts = jnp.asarray(expert_x, jnp.int32)
    operands = a.values, a.scales.T, b.values, b.scales, experts
    return interpreted(lambda *x: multiply_rows(*x, dtype=dtype, walk=walk), *operands)


@needs_interpreter
@pytest.mark.parametrize(
    ("expert_x", "columns", "walk"),
    [
        ([0, 2], 256, FEW),  # two tiles of rows an expert, one expert without rows
        pytest.param([1], 128, Walk(8, stages=2, multiprocessors=3), marks=slow),
        pytest.param([2, 0, 0, 1], 384, Walk(8, multiprocessors=5), marks=slow),  # in any order
    ],
)
def test_rows_meet_their_experts_weight(expert_x: list[int], columns: int, walk: Walk):
    a, b = rows_and_weights(512, 384, columns)
    y = run_rows(a, b, expert_x, walk=walk)
    rows = 512 // len(expert_x)
    for i, expert in enumerate(expert_x):
        own = slice(i * rows, (i + 1) * rows)
        assert_products(y[own], exact(a)[own], exact(b)[expert])


@needs_interpreter
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_few_tiles_split_the_inner_size(dtype):
    a, b = rows_and_weights(256, 1024, 128)
    y = run_rows(a, b, [2, 0], dtype, Walk(8, multiprocessors=5))
    wanted = run_rows(a, b, [2, 0], dtype, FEW)  # as many tiles as blocks of the grid
    share = SHARE if dtype == jnp.float32 else 2**-8
    size = np.abs(exact(a)).max(1, keepdims=True) * np.abs(exact(b)).sum((0, 2))
    assert (np.abs(np.asarray(y, float) - np.asarray(wanted, float)) <= share * size).all()
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("tiles", "blocks", "resident", "splits"),
    [
        (1024, 56, 132, 1),
        (18, 56, 132, 7),
        (56, 16, 132, 2),
        (1, 12, 132, 3),  # of four blocks at least
        (1, 3, 132, 1),
        (40, 53, 132, 1),  # of equally many each
        (3, 56, 2, 1),
    ],
)
def test_splits_fit_beside_each_other(tiles: int, blocks: int, resident: int, splits: int):
    assert _splits(tiles, blocks, resident) == splits


@needs_interpreter
def test_outputs_are_rounded_once_and_numbers_that_are_none_stay_in_their_row():
    a, b = rows_and_weights(128, 256, 128)
    values = a.values.at[5, 7].set(jnp.nan)
    a = Blocked(values.at[9].set(0), a.scales.at[9].set(1), a.block)
    y = run_rows(a, b, [1])
    rounded = run_rows(a, b, [1], jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    assert jnp.isnan(y[5]).all()
    assert not jnp.isnan(jnp.delete(y, 5, 0)).any()
    assert not y[9].any()
    np.testing.assert_array_equal(
        np.asarray(rounded, np.float32), np.asarray(y.astype(jnp.bfloat16), np.float32)
    )


def columns_of(seed: int, width: int, tokens: int) -> Blocked:
    return fp8.quantize(lumpy(seed, width, tokens))


def run_columns(x: Blocked, y: Blocked, counts: list[int], walk: Walk = FEW) -> jax.Array:
    count_E = jnp.asarray(counts, jnp.int32)
    first_E = jnp.cumsum(count_E) - count_E
    operands = x.values, x.scales.T, y.values, y.scales.T, first_E, count_E
    return interpreted(lambda *args: multiply_columns(*args, walk=walk), *operands)


@needs_interpreter
@pytest.mark.parametrize(
    ("counts", "width", "walk"),
    [
        ([3, 0, 1], 256, FEW),  # an expert without tokens, in the middle
        pytest.param([4], 128, Walk(8, stages=2, multiprocessors=3), marks=slow),
        pytest.param(
            [0, 1, 2, 0], 384, Walk(8, multiprocessors=5), marks=slow
        ),  # last tokens unused
    ],
)
def test_gradients_sum_over_an_experts_own_tokens(counts: list[int], width: int, walk: Walk):
    x, y = columns_of(0, width, 512), columns_of(1, 128, 512)
    dw = run_columns(x, y, counts, walk)
    assert dw.dtype == jnp.float32
    for e, (start, count) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
        own = slice(128 * start, 128 * (start + count))
        assert_products(dw[e], exact(x)[:, own], exact(y)[:, own])
        assert count or not dw[e].any()


@needs_interpreter
def test_an_experts_numbers_that_are_none_are_nobody_elses():
    x, y = columns_of(0, 128, 384), columns_of(1, 128, 384)
    x = Blocked(x.values.at[3, 200].set(jnp.nan), x.scales, x.block)
    dw = run_columns(x, y, [1, 1, 1])
    assert jnp.isnan(dw[1, 3]).all()
    assert int(jnp.isnan(dw).sum()) == 128


@needs_interpreter
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_of_rows_lower_for_a_gpu(dtype):
    f8, f32 = jnp.float8_e4m3fn, jnp.float32
    shapes = [((4096, 7168), f8), ((56, 4096), f32), ((8, 2048, 7168), f8), ((8, 16, 56), f32)]
    operands = [jax.ShapeDtypeStruct(*x) for x in shapes] + [jax.ShapeDtypeStruct((32,), jnp.int32)]
    assert "mosaic_gpu" in lowered(lambda *x: multiply_rows(*x, dtype=dtype), *operands)


@needs_interpreter
def test_gradients_lower_for_a_gpu():
    f8, f32 = jnp.float8_e4m3fn, jnp.float32
    shapes = [((7168, 4096), f8), ((32, 7168), f32), ((2048, 4096), f8), ((32, 2048), f32)]
    operands = [jax.ShapeDtypeStruct(*x) for x in shapes]
    operands += [jax.ShapeDtypeStruct((8,), jnp.int32)] * 2
    assert "mosaic_gpu" in lowered(multiply_columns, *operands)
