"""Linears in low precision against three GEMMs over operands rounded one by one in NumPy."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quant.gemm import grouped_linear, linear
from dsv3_jax.quant.kept import keep
from dsv3_jax.quant.recipes import FP8, RECIPES, Operand, Rule
from dsv3_jax.quant.swiglu import swiglu
from dsv3_jax.quant.trained_weight import TrainedWeight
from tests.quant import oracle
from tests.shapes import compiled, normal

SHARE = 1e-6  # of the sum over k of |a| |b|: float32's rounding of sums over a few hundred terms
# Every rule of every recipe, those that are equal once
RULES = {
    rule: f"{recipe}-{kind}"
    for recipe, rules in reversed(RECIPES.items())
    for kind, rule in rules.items()
}
RAGGED = 300, 200, 140  # tokens, inputs, outputs: one short block along each


def trained(w: jax.Array, rule: Rule) -> TrainedWeight:
    return TrainedWeight(rule.weight.quantize(w), w, rule)


def run(function, x, weights, dy, rule: Rule):
    """Output, and gradients of x and of the weights."""
    return program(function, rule)(x, weights, dy)


@cache
def program(function, rule: Rule):
    """Of `run`; compiled once for all arrays of the same shapes."""

    def whole(x, weights, dy):
        blocked = [trained(w, rule).value for w in weights]

        def product(x, weights):
            stand_ins = [TrainedWeight(b, w, rule) for b, w in zip(blocked, weights, strict=True)]
            return function(x, *stand_ins)

        y, pull = jax.vjp(product, x, weights)
        return y, *pull(dy)

    return compiled(whole)


def lumpy(seed: int, *shape: int) -> np.ndarray:
    """Rows and columns of sizes from 2^-8 to 2^8, so that blocks differ."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(shape) * 2.0 ** draw.integers(-8, 8, (*shape[:-1], 1))
    return (x * 2.0 ** draw.integers(-4, 4, shape[-1])).astype(np.float32)


def assert_within(actual: jax.Array, expected: np.ndarray, size: np.ndarray) -> None:
    assert (np.abs(np.asarray(actual, float) - expected) <= SHARE * size).all()


@pytest.mark.parametrize("rule", RULES, ids=RULES.get)
def test_a_linear_is_the_oracles_three_products(rule: Rule):
    tokens, inputs, outputs = RAGGED
    x, w, dy = lumpy(0, tokens, inputs), lumpy(1, inputs, outputs), lumpy(2, tokens, outputs)
    expected = oracle.products(x, w, dy, rule)
    y, dx, (dw,) = run(linear, x, [w], dy, rule)
    for actual, name in ((y, "y"), (dx, "dx"), (dw, "dw")):
        assert_within(actual, getattr(expected, name), getattr(expected, f"{name}_size"))


@pytest.mark.parametrize("rows", [128, 20])
def test_each_experts_rows_are_tiled_by_themselves(rows: int):
    """Blocks of one expert add up; an expert without a token gets a gradient of zero."""
    rule, expert_x = FP8["dispatched"], jnp.asarray([2, 0, 2], jnp.int32)
    x, dy = lumpy(0, 3 * rows, 40), lumpy(1, 3 * rows, 24)
    w = lumpy(2, 4, 40, 24)
    y, dx, (dw,) = run(lambda x, *weights: grouped_linear(x, expert_x, *weights), x, [w], dy, rule)
    sums, sizes = np.zeros(w.shape), np.zeros(w.shape)
    for i, e in enumerate(expert_x.tolist()):
        at = np.s_[i * rows : (i + 1) * rows]
        expected = oracle.products(x[at], w[e], dy[at], rule)
        assert_within(y[at], expected.y, expected.y_size)
        assert_within(dx[at], expected.dx, expected.dx_size)
        sums[e] += expected.dw
        sizes[e] += expected.dw_size
    assert_within(dw, sums, sizes)
    assert not np.any(np.asarray(dw)[[1, 3]])


@pytest.mark.parametrize("grouped", [False, True])
def test_weights_side_by_side_are_products_side_by_side(grouped: bool):
    rule, expert_x = FP8["linear"], jnp.asarray([1, 0], jnp.int32)
    lead = (2,) if grouped else ()
    x, dy = lumpy(0, 40, 24), lumpy(1, 40, 18)
    pair = [lumpy(2, *lead, 24, 10), lumpy(3, *lead, 24, 8)]

    def product(x, *weights):
        return grouped_linear(x, expert_x, *weights) if grouped else linear(x, *weights)

    y, dx, dw = run(product, x, pair, dy, rule)
    halves = [run(product, x, [w], part, rule) for w, part in zip(pair, (dy[:, :10], dy[:, 10:]),
                                                                 strict=True)]  # fmt: skip
    np.testing.assert_allclose(y, np.concatenate([half[0] for half in halves], -1), rtol=1e-5)
    for actual, half in zip(dw, halves, strict=True):
        # Tiles along the tokens belong to one column: the neighbour's columns change nothing.
        np.testing.assert_allclose(actual, half[2][0], rtol=1e-5, atol=1e-5)
    assert dx.shape == x.shape


def test_behind_swiglu_only_its_arguments_are_kept_and_it_is_computed_again():
    rule, gate = FP8["expert_after_swiglu"], jnp.abs(normal(3, 40, 1))
    source, w, dy = lumpy(0, 40, 48) / 64, lumpy(1, 24, 10), lumpy(2, 40, 10)
    expert_x = jnp.zeros(1, jnp.int32)

    def whole(source, gate):
        h = swiglu(source, gate)
        kept = keep(source, rule.kept).dequantize()
        h_again, pull = jax.vjp(swiglu, kept, gate)
        return h, h_again, pull

    h, h_again, pull = whole(source, gate)
    forward = oracle.products(np.asarray(h), w, dy, rule)
    from_kept = replace(rule, kept=rule.wgrad_input)
    backward = oracle.products(np.asarray(h_again), w, dy, from_kept)

    def product(source, gate, w):
        weight = TrainedWeight(rule.weight.quantize(w), w, rule)
        return grouped_linear(source, expert_x, weight, activation=swiglu, gate_X1=gate)

    def whole_rule(source, gate, w, dy):
        y, pull = jax.vjp(product, source, gate, w)
        return y, pull(dy)

    y, gradients = compiled(whole_rule)(source, gate, w[None], dy)
    dsource, dgate = pull(jnp.asarray(backward.dx, jnp.float32))
    # A last bit of SwiGLU more or less moves a number of E4M3 now and then.
    for actual, expected in (
        (y, forward.y),
        (gradients[0], dsource),
        (gradients[1], dgate),
        (gradients[2][0], backward.dw),
    ):
        error = np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)
        assert error < 2e-3


LIVE_X = np.random.default_rng(0).permutation(128) < 77


@cache
def padded_program(kind: str):
    """A product of blocks with padding, and its gradients."""
    activation = swiglu if "swiglu" in kind else None

    def product(x, gate, w):
        weight = w
        if kind in FP8:
            weight = replace(trained(jax.lax.stop_gradient(w), FP8[kind]), slot=w)
        gate_X1 = gate if activation else None
        options = {"activation": activation, "gate_X1": gate_X1, "live_X": jnp.asarray(LIVE_X)}
        return grouped_linear(x, jnp.zeros(1, jnp.int32), weight, **options)

    def whole(x, gate, w, dy):
        y, pull = jax.vjp(product, x, gate, w)
        return y, *pull(dy)

    return compiled(whole)


@pytest.mark.parametrize("kind", ["dispatched", "expert_after_swiglu", "plain", "plain swiglu"])
@pytest.mark.parametrize("filling", [0.0, 1e30, np.nan])
def test_padding_changes_no_bit(kind: str, filling: float):
    """128 rows of which 51 are padding, in input, gate and gradient."""
    whole = padded_program(kind)
    x, w = lumpy(0, 128, 48 if "swiglu" in kind else 24), lumpy(1, 1, 24, 10)
    gate, dy = np.abs(lumpy(3, 128, 1)), lumpy(2, 128, 10)
    expected = whole(x, gate, w, dy)
    padded = [np.where(LIVE_X[:, None], a, np.float32(filling)) for a in (x, gate, dy)]
    y, dx, dgate, dw = whole(*padded[:2], w, padded[2])
    for actual, wanted in ((y, expected[0]), (dx, expected[1]), (dgate, expected[2])):
        assert np.array_equal(actual[LIVE_X], wanted[LIVE_X])
        assert not np.any(actual[~LIVE_X])
    assert np.array_equal(dw, expected[3])


def test_zeros_give_zeros():
    rule = FP8["after_attention"]
    x, w, dy = np.zeros((5, 8), np.float32), lumpy(0, 8, 3), np.zeros((5, 3), np.float32)
    for result in jax.tree.leaves(run(linear, x, [w], dy, rule)):
        assert not np.any(result)
    zero = np.zeros_like(w)
    y, dx, _ = run(linear, lumpy(1, 5, 8), [zero], lumpy(2, 5, 3), rule)
    assert not np.any(y)
    assert not np.any(dx)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_what_is_not_finite_never_becomes_finite(where: str, value: float):
    args = {"x": lumpy(0, 6, 8), "w": lumpy(1, 8, 3), "dy": lumpy(2, 6, 3)}
    args[where][2, 1] = value
    y, dx, (dw,) = run(linear, args["x"], [args["w"]], args["dy"], FP8["linear"])
    finite = {name: np.isfinite(a) for name, a in (("y", y), ("dx", dx), ("dw", dw))}
    if where == "x":
        assert not finite["y"][2].any()
        assert finite["y"][[0, 1, 3, 4, 5]].all()
        assert not finite["dw"][1].any()
    elif where == "w":
        assert not finite["y"][:, 1].any()
        assert not finite["dx"][:, 2].any()
    else:
        assert not finite["dx"][2].any()
        assert not finite["dw"][:, 1].any()


@pytest.mark.parametrize("scale", ["float32", "pow2"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m6"])
def test_what_is_kept_is_what_was_quantised(fmt: str, scale: str):
    operand = Operand((1, 128), fmt, scale)
    x = lumpy(0, 9, 201)
    kept = compiled(lambda x: keep(x, operand))(x)
    assert np.array_equal(compiled(lambda k: k.dequantize())(kept), oracle.rounded(x, operand))
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(kept)]
    assert sizes == [9 * (303 if fmt == "e5m6" else 201), 9 * 2 * (1 if scale == "pow2" else 4)]


def test_outputs_have_the_activations_dtype_and_weights_gradients_their_own():
    x, w, dy = (lumpy(i, *shape) for i, shape in enumerate([(6, 8), (8, 3), (6, 3)]))
    x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, dy))
    y, dx, (dw,) = run(linear, x, [w], dy, FP8["linear"])
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)


def table(recipe: str) -> dict[str, tuple]:
    """Block, format and scale of input, weight and output's gradient, of Wgrad's two operands and
    of what is kept.
    """
    return {
        kind: tuple((o.block, o.fmt, o.scale) for o in (
            rule.input, rule.weight, rule.grad_output,
            rule.wgrad_input, rule.wgrad_grad_output, rule.kept,
        ))
        for kind, rule in RECIPES[recipe].items()
    }  # fmt: skip


def fine_grained(x: str, w: str, dy: str, kept: tuple) -> tuple:
    return (
        (ROW, "e4m3", x), (SQUARE, "e4m3", w), (ROW, "e4m3", dy),
        (COLUMN, "e4m3", x), (COLUMN, "e4m3", dy), kept,
    )  # fmt: skip


def test_recipes_are_the_reports():
    """3.3.2 and 3.3.3, appendix B.2, and what was usual before."""
    plain = fine_grained("float32", "float32", "float32", (ROW, "e4m3", "float32"))
    assert table("fp8") == {
        "linear": plain,
        "after_attention": fine_grained("pow2", "float32", "float32", (ROW, "e5m6", "pow2")),
        "dispatched": fine_grained("pow2", "float32", "float32", (ROW, "e4m3", "pow2")),
        "after_swiglu": plain,
        "expert_after_swiglu": fine_grained("float32", "float32", "pow2", plain[-1]),
    }
    for kind, operands in table("fp8_pow2").items():
        assert operands == tuple((*o[:2], "pow2") for o in table("fp8")[kind])
    for kind, (x, w, dy, wgrad_x, wgrad_dy, kept) in table("fp8_square_gradients").items():
        assert (x, w, None, wgrad_x, None, kept) == tuple(
            None if i in (2, 4) else o for i, o in enumerate(table("fp8")[kind])
        )
        assert dy == wgrad_dy == (SQUARE, "e4m3", table("fp8")[kind][2][2])
    forward, backward = (None, "e4m3", "float32"), (None, "e5m2", "float32")
    whole = forward, forward, backward, forward, backward, forward
    assert table("fp8_per_tensor") == dict.fromkeys(FP8, whole)


def test_one_scale_is_one_for_all_groups_of_rows():
    x = lumpy(0, 3, 20, 24)
    actual = compiled(Operand(None).fake_quantize)(x)
    expected = oracle.rounded(x.reshape(60, 24), Operand(None)).reshape(x.shape)
    assert np.array_equal(actual, expected)


def test_retiled_numbers_lie_on_ties_and_are_rounded_as_in_numpy():
    """E4M3 over a float32 scale, once more: many quotients lie between two numbers."""
    rule = FP8["linear"]
    x = lumpy(0, 256, 200)
    kept = compiled(lambda x: keep(x, rule.kept).dequantize())(x)
    again = compiled(rule.wgrad_input.fake_quantize)(kept)
    assert np.array_equal(again, oracle.rounded(np.asarray(kept), rule.wgrad_input))
