"""A weight's gradient put off is the gradient made at once; what a tape carries, it carries bit for
bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv3_jax.quant import tape
from dsv3_jax.quant.gemm import grouped_linear, linear
from dsv3_jax.quant.recipes import FP8, RECIPES, Rule
from dsv3_jax.quant.swiglu import swiglu
from dsv3_jax.quant.tape import Entry, Slot, Tape
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.quant.wide import wide
from tests.jaxprs import equations
from tests.shapes import compiled, normal
from tests.tolerances import FLOAT64, assert_close

# Every rule of every recipe, those that are equal once; in the default tier one whose input is kept
# in 12 bits, and one that has E5M2 and one scale for a whole matrix
RULES = {
    rule: f"{recipe}-{kind}"
    for recipe, rules in reversed(RECIPES.items())
    for kind, rule in rules.items()
}
QUICK = ("fp8-after_attention", "fp8_per_tensor-expert_after_swiglu")
E, EXPERTS = 3, (2, 0, 2, 0)  # the second expert gets nothing
GROUPS = len(EXPERTS)


class Pulled(NamedTuple):
    y: jax.Array
    dx: jax.Array
    dw: dict[str, jax.Array]


def names(weights: Sequence[jax.Array]) -> list[str]:
    return [f"w{i}" for i in range(len(weights))]


def stand_ins(weights: Sequence[jax.Array], slots: Sequence[Any], rule: Rule | None, dtype) -> list:
    return [
        TrainedWeight(rule.weight.quantize(w) if rule else w.astype(dtype), slot, rule)
        for w, slot in zip(weights, slots, strict=True)
    ]


def at_once(product: Callable, x, weights, dy, rule: Rule | None = None) -> Pulled:
    """JAX's own gradient."""

    def whole(x, weights, dy):
        masters = [jnp.zeros(w.shape, wide(x.dtype)) for w in weights]

        def of(x, masters):
            return product(x, *stand_ins(weights, masters, rule, x.dtype))

        y, pull = jax.vjp(of, x, masters)
        dx, dw = pull(dy)
        return Pulled(y, dx, dict(zip(names(weights), dw, strict=True)))

    return compiled(whole)(x, weights, dy)


def put_off(product: Callable, x, weights, dy, rule: Rule | None = None) -> Pulled:
    """With slots; the gradients in a program of their own, as W is."""
    noted = Tape()

    def of(x, weights, left):
        slots = [Slot(left.get(n, ()), n, noted, wide(x.dtype)) for n in names(weights)]
        return product(x, *stand_ins(weights, slots, rule, x.dtype))

    jax.eval_shape(of, x, weights, {})
    left = {n: _zeros(entry) for n, entry in noted.entries.items()}

    def backward(x, weights, left, dy):
        y, pull = jax.vjp(lambda x, left: of(x, weights, left), x, left)
        return y, *pull(dy)

    y, dx, left = compiled(backward)(x, weights, left, dy)
    assert list(left) == ["w0"]  # products side by side are one
    return Pulled(y, dx, compiled(noted.entries["w0"].gradients)(left["w0"]))


def _zeros(entry: Entry) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(x.shape, x.dtype) for x in entry.zeros)


def same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def both(product: Callable, x, weights, dy, rule: Rule | None = None) -> None:
    """The gradient put off, and all else that comes out, are what they are at once."""
    expected = at_once(product, x, weights, dy, rule)
    assert all(np.asarray(dw, float).any() for dw in expected.dw.values())
    same_bits(put_off(product, x, weights, dy, rule), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(7,), (7, 2, 5)], ids=["one", "side by side"])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 40)], ids=str)
def test_of_linears(dtype: str, widths: tuple[int, ...], rows: tuple[int, ...]):
    """Below and from the number of rows from which weights side by side are joined."""
    weights = [normal(i, 9, width) for i, width in enumerate(widths)]
    x, dy = normal(8, *rows, 9, dtype=dtype), normal(9, *rows, sum(widths), dtype=dtype)
    both(linear, x, weights, dy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(7,), (7, 2)], ids=["one", "side by side"])
def test_of_grouped_linears(dtype: str, widths: tuple[int, ...]):
    """Blocks of rows name their experts, one of which gets none."""
    weights = [normal(i, E, 9, width) for i, width in enumerate(widths)]
    x, dy = normal(8, 3 * GROUPS, 9, dtype=dtype), normal(9, 3 * GROUPS, sum(widths), dtype=dtype)
    both(grouped(), x, weights, dy)


def grouped(**kwargs: Any) -> Callable:
    """`grouped_linear` with the experts as an argument of the product."""

    def product(x, *weights):
        return grouped_linear(x, jnp.asarray(EXPERTS, jnp.int32), *weights, **kwargs)

    return product


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_behind_an_activation(dtype: str):
    """SwiGLU and the gate are recomputed for W where products are in low precision; here the
    product's own input is kept.
    """
    x, gate = normal(8, 12, 18, dtype=dtype), abs(normal(7, 12, 1, dtype=dtype))
    dy = normal(9, 12, 7, dtype=dtype)
    both(partial(linear, activation=swiglu), x, [normal(0, 9, 7)], dy)
    both(grouped(activation=swiglu, gate_X1=gate), x, [normal(0, E, 9, 7)], dy)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for rule, name in RULES.items()
    ],
)
def test_of_every_rule_in_low_precision(rule: Rule):
    """Odd sizes with a short block along each; one weight, and in blocks of experts a pair. Packed
    formats and scales of one byte leave as bits.
    """
    x, dy = normal(0, 131, 142), normal(1, 131, 133)
    both(linear, x, [normal(2, 142, 133)], dy, rule)
    x, dy = normal(0, 33 * GROUPS, 142), normal(1, 33 * GROUPS, 9)
    both(grouped(), x, [normal(2, E, 142, 7), normal(3, E, 142, 2)], dy, rule)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("expert_after_swiglu", "bfloat16"),
        pytest.param("after_swiglu", "float32", marks=pytest.mark.slow),
    ],
)
def test_of_low_precision_behind_an_activation(kind: str, dtype: str):
    """What leaves is SwiGLU's arguments as kept, and the gate."""
    rule, rows = FP8[kind], 33 * GROUPS
    x, dy = normal(0, rows, 2 * 131, dtype=dtype), normal(1, rows, 7, dtype=dtype)
    gate = abs(normal(2, rows, 1, dtype=dtype))
    both(partial(linear, activation=swiglu), x, [normal(3, 131, 7)], dy, rule)
    both(grouped(activation=swiglu, gate_X1=gate), x, [normal(3, E, 131, 7)], dy, rule)


def test_in_float64(x64):
    x, dy = normal(8, 5, 9), normal(9, 5, 9)
    weights = [normal(0, 9, 7), normal(1, 9, 2)]
    found, expected = put_off(linear, x, weights, dy), at_once(linear, x, weights, dy)
    assert {dw.dtype.name for dw in found.dw.values()} == {"float64"}
    assert_close(found, expected, FLOAT64)


@pytest.mark.parametrize("recomputed", [False, True])
def test_of_a_stack_of_layers(recomputed: bool):
    """Scanned, and with all of a layer recomputed: each layer leaves its own operands."""
    layers, noted = 3, Tape()
    w, x, dy = normal(0, layers, 9, 9), normal(1, 5, 9), normal(2, 5, 9)

    def stack(x, w, slot):
        def layer(x, weight):
            return jnp.sin(linear(x, weight)), None

        layer = jax.checkpoint(layer) if recomputed else layer
        return lax.scan(layer, x, TrainedWeight(w, slot))[0]

    jax.eval_shape(lambda x: stack(x, w, Slot((), "w", noted, x.dtype)), x)
    entry = noted.entries["w"]
    left = tuple(jnp.zeros((layers, *z.shape), z.dtype) for z in entry.zeros)

    def of(x, left):
        return stack(x, w, Slot(left, "w", noted, x.dtype))

    dx, left = compiled(lambda x, left, dy: jax.vjp(of, x, left)[1](dy))(x, left, dy)
    dw = compiled(jax.vmap(entry.gradients))(left)["w"]
    expected = compiled(lambda x, w, dy: jax.vjp(lambda *a: stack(a[0], w, a[1]), x, w)[1](dy))
    assert_close((dx, dw), expected(x, w, dy), 1e-6)


def test_a_backward_pass_with_a_slot_has_no_product_for_weights():
    """Three products without it: y, dx, dw."""
    x, w = normal(0, 5, 9), normal(1, 9, 7)
    noted = Tape()
    jax.eval_shape(lambda: linear(x, TrainedWeight(w, Slot((), "w", noted, x.dtype))))
    slot = Slot(_zeros(noted.entries["w"]), "w", noted, x.dtype)

    def count(slot: Any) -> int:
        def whole(x, slot):
            y, pull = jax.vjp(lambda x, slot: linear(x, TrainedWeight(w, slot)), x, slot)
            return pull(y)

        return sum(eqn.primitive.name == "dot_general" for eqn in equations(whole, x, slot))

    assert count(w) == 3
    assert count(slot) == 2
    entry, left = noted.entries["w"], slot.left
    assert sum(eqn.primitive.name == "dot_general" for eqn in equations(entry.gradients, left)) == 1


# --- bits ----------------------------------------------------------------------------------------


def carried(x: jax.Array) -> tuple[Entry, tuple[jax.Array, ...], jax.Array]:
    """An array as a product's only operand, through a backward pass and out again."""
    noted = Tape()

    def gradient(x):
        return x

    @jax.custom_vjp
    def product(y, slots, x):
        return forward(y, slots, x)[0]

    def forward(y, slots, x):
        tape.note(slots, (x.shape[-1],), gradient, (x,))
        return y, (x, tape.hollow(slots))

    def backward(residuals, dy):
        x, slots = residuals
        return dy, tape.cotangents(slots, (x.shape[-1],), gradient, (x,)), None

    product.defvjp(forward, backward)
    one = jnp.ones(())
    jax.eval_shape(lambda x: product(one, (Slot((), "w", noted, x.dtype),), x), x)
    entry = noted.entries["w"]

    def pulled(left, x):
        def of(left):
            return product(one, (Slot(left, "w", noted, x.dtype),), x)

        return jax.vjp(of, left)[1](one)[0]

    left = compiled(pulled)(_zeros(entry), x)
    return entry, left, compiled(entry.gradients)(left)["w"]


BYTES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize(
    "x",
    [
        BYTES[:9],
        BYTES[:250].reshape(5, 2, 25),
        BYTES.view(jnp.float8_e4m3fn),
        BYTES[:255].view(jnp.float8_e5m2),
        BYTES[:3].view(jnp.float8_e4m3fn),
        np.arange(-3, 8, dtype=np.int32),
        # As float32: the least number, which many machines flush to 0, and a signalling NaN
        np.array([1, 0x7F800001, -0x7FFFFF, 0x7FC00000], np.int32),
        np.arange(7, dtype=np.int16),
        np.array([[0.0, -0.0, 1.0], [np.nan, np.inf, 1e-45]], np.float32),
        np.array([[0.0, -0.0, 1.0, np.nan, np.inf]], jnp.bfloat16),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_every_bit_arrives(x: np.ndarray):
    _, left, found = carried(jnp.asarray(x))
    same_bits(found, x)
    assert all(z.dtype in (jnp.float32, x.dtype) for z in left)


def test_bits_take_no_more_bytes_than_the_numbers():
    """But for the last word. Floats of two bytes and more travel as they are."""
    for x, size in ((BYTES[:9], 12), (BYTES.view(jnp.float8_e5m2), 256)):
        assert sum(z.nbytes for z in carried(jnp.asarray(x))[1]) == size
    for dtype in ("bfloat16", "float32"):
        entry, left, _ = carried(normal(0, 3, 5, dtype=dtype))
        assert [(z.dtype, z.shape) for z in left] == [(dtype, (3, 5))]
        assert [(z.dtype, z.shape) for z in entry.zeros] == [(dtype, (3, 5))]


def test_an_input_kept_in_12_bits_leaves_in_12_bits_and_dy_in_8():
    """And the input's scales, powers of two, in 8."""
    rule, noted = FP8["after_attention"], Tape()
    x, w = normal(0, 6, 256), normal(1, 256, 5)

    def product(x):
        return linear(
            x, TrainedWeight(rule.weight.quantize(w), Slot((), "w", noted, x.dtype), rule)
        )

    jax.eval_shape(product, x)
    values, scales, dy, dy_scales = noted.entries["w"].zeros
    assert (values.dtype, values.size * 4) == (jnp.float32, 6 * 256 * 3 // 2)
    assert scales.size * 4 == 6 * 2
    assert dy.size * 4 == 6 * 5 + 2  # in whole float32
    assert (dy_scales.dtype, dy_scales.shape) == (jnp.float32, (1, 1, 5))


def test_a_slot_indexes_as_the_weight_does():
    noted = Tape()
    slot = Slot((jnp.arange(6).reshape(3, 2), jnp.arange(3)), "w", noted, jnp.float32)
    assert [x.tolist() for x in slot[1].left] == [[2, 3], 1]
    assert Slot((), "w", noted, jnp.float32)[1].left == ()
