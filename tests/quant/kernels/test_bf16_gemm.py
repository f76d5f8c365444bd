"""Grouped kernels of bfloat16, interpreted, against products in float64 and gathered weights."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quant import gemm
from dsv3_jax.quant.gemm import grouped_linear
from tests.quant.kernels.interpret import interpreted, lowered, needs_interpreter
from tests.shapes import compiled, normal

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from dsv3_jax.quant.kernels import bf16_gemm
from dsv3_jax.quant.kernels.bf16_gemm import multiply_blocks, sum_blocks
from dsv3_jax.quant.kernels.walk import Walk

EXPERTS, ROWS, D, F = 3, 512, 256, 384
FEW = Walk(2, multiprocessors=2)
ROUNDING = 2**-8  # of an output in bfloat16
SHARE = 2e-6  # of sums of magnitudes: float32's rounding over a few hundred terms
slow = pytest.mark.slow


def rows(seed: int, width: int) -> jax.Array:
    return normal(seed, ROWS, width, dtype="bfloat16")


def parts(owners: list[int]) -> list[tuple[int, slice]]:
    each = ROWS // len(owners)
    return [(e, slice(i * each, (i + 1) * each)) for i, e in enumerate(owners)]


def assert_near(actual: jax.Array, a: np.ndarray, b: np.ndarray, share: float) -> None:
    """actual = a b"""
    a, b, size = a.astype(float), b.astype(float), np.abs(a).astype(float) @ np.abs(b).astype(float)
    assert (np.abs(np.asarray(actual, float) - a @ b) <= share * size).all()


@needs_interpreter
@pytest.mark.parametrize(
    ("owners", "columns", "walk"),
    [
        ([0, 2], 256, FEW),
        pytest.param([2, 0, 0, 1], 384, Walk(8, stages=2, multiprocessors=3), marks=slow),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_meet_their_experts_weight(
    owners: list[int], columns: int, walk: Walk, transposed: bool
):
    x, w = rows(0, D), normal(1, EXPERTS, D, columns, dtype="bfloat16")
    given = jnp.swapaxes(w, 1, 2) if transposed else w
    run = partial(multiply_blocks, transposed=transposed, walk=walk)
    y = interpreted(run, x, given, jnp.asarray(owners, jnp.int32))
    assert y.dtype == jnp.bfloat16
    for expert, own in parts(owners):
        assert_near(y[own], np.asarray(x[own]), np.asarray(w[expert]), ROUNDING)


@needs_interpreter
@pytest.mark.parametrize(
    ("owners", "walk"),
    [
        ([0, 0, 0, 2], FEW),  # one without rows, in the middle
        pytest.param([1, 1], Walk(8, stages=2, multiprocessors=3), marks=slow),
    ],
)
def test_gradients_sum_over_an_experts_own_rows(owners: list[int], walk: Walk):
    x, dy = rows(0, 256), rows(1, 128)
    run = partial(sum_blocks, experts=EXPERTS, walk=walk)
    dw = interpreted(run, x, dy, jnp.asarray(owners, jnp.int32))
    assert dw.dtype == jnp.float32
    for e in range(EXPERTS):
        own = np.concatenate([np.arange(ROWS)[p] for o, p in parts(owners) if o == e] or [[]])
        own = own.astype(int)
        assert_near(dw[e], np.asarray(x)[own].T, np.asarray(dy)[own], SHARE)


@needs_interpreter
def test_an_experts_numbers_that_are_none_are_nobody_elses():
    x, dy, owners = rows(0, 128), rows(1, 128), jnp.asarray([0, 0, 1, 2], jnp.int32)
    w = normal(2, EXPERTS, 128, 128, dtype="bfloat16")
    y = interpreted(partial(multiply_blocks, walk=FEW), x, w.at[1, 3, 5].set(jnp.nan), owners)
    assert jnp.isnan(y[256:384, 5]).all()
    assert int(jnp.isnan(y).sum()) == 128
    run = partial(sum_blocks, experts=EXPERTS, walk=FEW)
    dw = interpreted(run, x.at[300, 7].set(jnp.nan), dy, owners)
    assert jnp.isnan(dw[1, 7]).all()
    assert int(jnp.isnan(dw).sum()) == 128


@needs_interpreter
@pytest.mark.parametrize("widths", [(F,), pytest.param((128, 256), marks=slow)])
def test_linears_of_experts_take_them_on_a_hopper(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]
):
    x, dy, owners = rows(0, D), rows(1, F), jnp.asarray([0, 2], jnp.int32)
    weights = [normal(2 + i, EXPERTS, D, width, dtype="float32") for i, width in enumerate(widths)]

    def both(x, weights):
        y, pull = jax.vjp(lambda x, ws: grouped_linear(x, owners, *ws), x, weights)
        return y, *pull(dy)

    expected = compiled(both)(x, weights)
    called = []

    def noted(name: str, original: Callable) -> Callable:
        return lambda *args, **how: called.append(name) or original(*args, **how, walk=FEW)

    for name in ("multiply_blocks", "sum_blocks"):
        monkeypatch.setattr(bf16_gemm, name, noted(name, getattr(bf16_gemm, name)))
    monkeypatch.setattr(gemm, "lacking", lambda: None)
    found = interpreted(both, x, weights)
    assert called == ["multiply_blocks", "multiply_blocks", "sum_blocks"]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.linalg.norm(a - b) <= ROUNDING * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("rows_of_each", "inner", "width", "dtype"),
    [
        (64, D, F, "bfloat16"),
        (128, 200, F, "bfloat16"),
        (128, D, 100, "bfloat16"),
        (128, D, F, "float32"),
    ],
)
def test_other_sizes_and_types_are_gathered(
    monkeypatch: pytest.MonkeyPatch, rows_of_each: int, inner: int, width: int, dtype: str
):
    monkeypatch.setattr(gemm, "lacking", lambda: None)
    x = jnp.zeros((2 * rows_of_each, inner), dtype)
    assert not gemm._by_kernels(x, width, jnp.zeros(2, jnp.int32))
    assert gemm._by_kernels(jnp.zeros((256, D), "bfloat16"), F, jnp.zeros(2, jnp.int32))


@needs_interpreter
@pytest.mark.parametrize("transposed", [False, True])
def test_products_lower_for_a_gpu(transposed: bool):
    shapes = [((4096, 2048), jnp.bfloat16), ((8, 2048, 2048), jnp.bfloat16), ((32,), jnp.int32)]
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    assert "mosaic_gpu" in lowered(partial(multiply_blocks, transposed=transposed), *operands)


@needs_interpreter
def test_gradients_lower_for_a_gpu():
    shapes = [((4096, 7168), jnp.bfloat16), ((4096, 2048), jnp.bfloat16), ((32,), jnp.int32)]
    operands = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    assert "mosaic_gpu" in lowered(partial(sum_blocks, experts=8), *operands)


def with_gradients(x: jax.Array, weights: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, w: grouped_linear(x, jnp.asarray([0, 2], jnp.int32), w), x, weights)
    return y, *pull(dy)


@needs_interpreter
def test_on_a_mesh_results_differ_where_rows_do(monkeypatch: pytest.MonkeyPatch):
    """As `shard_map` has it checked; experts' weights are the same everywhere here."""
    monkeypatch.setattr(gemm, "lacking", lambda: None)

    def per_device(x, weights, dy):
        here = jax.lax.pcast(weights, "rows", to="varying")
        return jax.tree.map(
            lambda y: jax.lax.psum(y.astype(jnp.float32), "rows"), with_gradients(x, here, dy)
        )

    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.P("rows"), jax.P(), jax.P("rows")
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=jax.P())
    weights = normal(2, EXPERTS, D, F, dtype="float32")
    x, dy = (jnp.concatenate([a, a]) for a in (rows(0, D), rows(1, F)))
    assert lowered(mapped, x, weights, dy).count("@mosaic_gpu") == 3


@needs_interpreter
def test_layers_are_stacked(monkeypatch: pytest.MonkeyPatch):
    """As a pipeline's stage maps W over them."""
    monkeypatch.setattr(gemm, "lacking", lambda: None)
    operands = rows(0, D), normal(2, EXPERTS, D, F, dtype="float32"), rows(1, F)
    stacked = [jnp.stack([a, a]) for a in operands]
    assert lowered(jax.vmap(with_gradients), *stacked).count("@mosaic_gpu") == 3
