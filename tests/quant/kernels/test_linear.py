"""Linears whose products kernels make, interpreted, against the definition."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.quant import WITH_KERNELS
from dsv3_jax.quant import fp8_gemm
from dsv3_jax.quant.gemm import grouped_linear, linear
from dsv3_jax.quant.recipes import FP8, RECIPES, Rule
from dsv3_jax.quant.swiglu import swiglu
from dsv3_jax.quant.tape import Slot, Tape
from dsv3_jax.quant.trained_weight import TrainedWeight
from tests.quant.kernels.interpret import interpreted, lowered, needs_interpreter
from tests.shapes import compiled, normal

# Of the norm. Float32's rounding of sums, and now and then a number of bfloat16 or of 8 bits that
# it turned.
SHARE = 3e-4
ROWS, INNER, EXPERTS = 256, 128, 3
OWN = [0, 2]  # of the two blocks of rows: one expert has none
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch):
    """The interpreter runs each of the grid's blocks, also those without work."""
    from dsv3_jax.quant.kernels import linear as kernels
    from dsv3_jax.quant.kernels.walk import Walk

    for name in ("multiply_rows", "multiply_columns"):
        few = partial(getattr(kernels, name), walk=Walk(8, multiprocessors=2))
        monkeypatch.setattr(kernels, name, few)


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))


def case(kind: str, widths: tuple[int, ...]) -> tuple[Callable, jax.Array, list, jax.Array, dict]:
    """A linear of this class, its input, its weights, its output's gradient, its gate."""
    grouped = kind in ("dispatched", "expert_after_swiglu")
    activation = swiglu if kind.endswith("swiglu") else None
    experts = (EXPERTS,) if grouped else ()
    x = normal(0, ROWS, 2 * INNER if activation else INNER, dtype="bfloat16")
    dy = normal(1, ROWS, sum(widths), dtype="bfloat16")
    weights = [normal(2 + i, *experts, INNER, width) for i, width in enumerate(widths)]
    gate = {"gate_X1": abs(normal(9, ROWS, 1))} if grouped and activation else {}

    def product(x, weights, gate):
        if grouped:
            experts_x = jnp.asarray(OWN, jnp.int32)
            return grouped_linear(x, experts_x, *weights, activation=activation, **gate)
        return linear(x, *weights, activation=activation)

    return product, x, weights, dy, gate


def with_gradients(product: Callable, rule: Rule, x, weights, dy, gate):
    blocked = [rule.weight.quantize(w) for w in weights]

    def of(x, weights, gate):
        stand_ins = [TrainedWeight(b, w, rule) for b, w in zip(blocked, weights, strict=True)]
        return product(x, stand_ins, gate)

    y, pull = jax.vjp(of, x, weights, gate)
    return y, *pull(dy)


@pytest.fixture
def kernels_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the products that kernels were asked for."""
    called: list[str] = []
    kernels = fp8_gemm._kernels()
    for name in ("forward", "input_gradient", "weight_gradient"):
        original = getattr(kernels, name)

        def noted(*args, name=name, original=original, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, noted)
    return called


def assert_near(actual, expected, share: float = SHARE) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert b.any()
        assert np.linalg.norm(a - b) <= share * np.linalg.norm(b)


@needs_interpreter
@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        ("linear", (128, 64)),  # side by side, the last filled up
        ("expert_after_swiglu", (128,)),
        pytest.param("after_attention", (128,), marks=slow),  # kept in E5M6
        pytest.param("after_swiglu", (128,), marks=slow),
        pytest.param("dispatched", (128, 128), marks=slow),
    ],
)
def test_products_and_gradients_are_the_definitions(
    kernels_called: list[str], kind: str, widths: tuple[int, ...]
):
    product, x, weights, dy, gate = case(kind, widths)
    rule = FP8[kind]
    expected = compiled(partial(with_gradients, product, rule))(x, weights, dy, gate)
    by_kernels = partial(with_gradients, product, replace(rule, by_kernels=True))
    assert not kernels_called
    assert_near(interpreted(by_kernels, x, weights, dy, gate), expected)
    assert kernels_called == ["forward", "input_gradient", "weight_gradient"]


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "expert_after_swiglu"])
def test_gradients_put_off_are_those_made_at_once(kernels_called: list[str], kind: str):
    product, x, weights, dy, gate = case(kind, (128,))
    rule, noted = replace(FP8[kind], by_kernels=True), Tape()
    at_once = interpreted(partial(with_gradients, product, rule), x, weights, dy, gate)

    def of(x, left):
        slot = Slot(left, "w", noted, jnp.float32)
        stand_ins = [TrainedWeight(rule.weight.quantize(w), slot, rule) for w in weights]
        return product(x, stand_ins, gate)

    jax.eval_shape(of, x, ())
    zeros = tuple(jnp.zeros(z.shape, z.dtype) for z in noted.entries["w"].zeros)

    def later(x, zeros, dy):
        _, pull = jax.vjp(of, x, zeros)
        return noted.entries["w"].gradients(pull(dy)[1])["w"]

    np.testing.assert_array_equal(interpreted(later, x, zeros, dy), at_once[2][0])
    assert kernels_called.count("weight_gradient") == 2


@needs_interpreter
@pytest.mark.slow
def test_layers_stacked_are_layers_one_by_one(kernels_called: list[str]):
    """W of a pipeline's stage maps over its layers."""
    product, x, weights, dy, gate = case("linear", (128,))
    run = partial(with_gradients, product, replace(FP8["linear"], by_kernels=True))

    def stacked(x, weights, dy, gate):
        twice = [jnp.stack([w, 2 * w]) for w in weights]
        return jax.vmap(run, (None, 0, None, None))(x, twice, dy, gate)

    found = interpreted(stacked, x, weights, dy, gate)
    for i, scale in enumerate((1, 2)):
        one = interpreted(run, x, [scale * w for w in weights], dy, gate)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(np.asarray(a[i], float), np.asarray(b, float))
    assert kernels_called.count("weight_gradient") == 3


@needs_interpreter
def test_on_a_mesh_results_differ_where_rows_do(mesh: jax.sharding.Mesh):
    """As `shard_map` has it checked; weights are the same everywhere, their gradients are not."""
    product, x, weights, dy, gate = case("expert_after_swiglu", (128,))
    run = partial(with_gradients, product, replace(FP8["expert_after_swiglu"], by_kernels=True))

    def per_device(x, weights, dy, gate):
        here = jax.tree.map(lambda w: jax.lax.pcast(w, "rows", to="varying"), weights)
        return jax.tree.map(
            lambda y: jax.lax.psum(y.astype(jnp.float32), "rows"), run(x, here, dy, gate)
        )

    rows = jax.P("rows")
    specs = rows, jax.P(), rows, rows
    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=jax.P())
    args = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, dy, gate))
    assert "mosaic_gpu" in lowered(mapped, args[0], weights, args[1], args[2])


UNFIT = {
    "rows": ("linear", 200, 128, (128,)),
    "inner size": ("linear", 256, 96, (128,)),
    "all widths but the last": ("linear", 256, 128, (64, 128)),
}


@pytest.mark.parametrize("why", UNFIT)
def test_what_kernels_cannot_take_is_the_definitions_bit_for_bit(
    kernels_called: list[str], why: str
):
    kind, rows, inner, widths = UNFIT[why]
    x, dy = normal(0, rows, inner), normal(1, rows, sum(widths))
    weights = [normal(2 + i, inner, width) for i, width in enumerate(widths)]
    found = [
        compiled(partial(with_gradients, lambda x, ws, _: linear(x, *ws), rule))(x, weights, dy, {})
        for rule in (FP8[kind], replace(FP8[kind], by_kernels=True))
    ]
    assert not kernels_called
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_rules_of_the_report_are_kernels():
    kernels = fp8_gemm._kernels()
    takes = {
        recipe
        for recipe, rules in RECIPES.items()
        for rule in rules.values()
        if kernels.fits(rule, 256, 1, 128, (128,))
    }
    assert takes == set(WITH_KERNELS)
