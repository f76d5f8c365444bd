"""Initial weights as a function of seed, path and layer; RMSNorm and SwiGLU against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import FeedForward, Init, rms_norm
from dsv3_jax.quant.swiglu import swiglu
from tests.shapes import compiled, normal, random_module
from tests.tolerances import FLOAT64, assert_close

STD = 0.006


def draw(*path: str | int, seed: int = 0, dtype=jnp.float32, shape=(40, 50)) -> jax.Array:
    """The weight whose path is `path`; an int is a layer."""
    init = Init(jax.random.key(seed), STD, jnp.dtype(dtype))
    for part in path[:-1]:
        init = init.at(part) if isinstance(part, str) else init.layer(part)
    return init.normal(path[-1], *shape)[...]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_weights_have_the_asked_deviation_and_no_bias():
    weights = np.asarray(draw("w"), np.float64)
    # 2000 draws: the mean is off by std / sqrt(2000), the deviation by std / sqrt(4000); four
    # of each.
    assert abs(weights.mean()) < 4 * STD / np.sqrt(2000)
    assert abs(weights.std() - STD) < 4 * STD / np.sqrt(4000)
    assert 3 * STD < np.abs(weights).max() < 6 * STD  # normal, not uniform, and no outliers


def test_weights_are_a_function_of_seed_path_and_layer():
    places = [("w",), ("v",), ("mla", "w"), ("moe", "w"), (0, "w"), (1, "w"), (1, "mla", "w")]
    weights = [draw(*place, shape=(4,)) for place in places] + [draw("w", seed=1, shape=(4,))]
    first_values = {float(w[0]) for w in weights}
    assert len(first_values) == len(weights)
    np.testing.assert_array_equal(draw(1, "mla", "w", shape=(4,)), weights[6])


def test_stacked_layers_get_the_weights_of_single_layers():
    stacked = jax.vmap(lambda layer: draw(layer, "w", shape=(4,)))(jnp.arange(2, 5))
    np.testing.assert_array_equal(stacked, [draw(i, "w", shape=(4,)) for i in (2, 3, 4)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_models_of_other_dtypes_start_from_the_same_weights(x64, dtype):
    np.testing.assert_array_equal(draw("w", dtype=dtype), draw("w").astype(dtype))


def test_gains_start_at_one():
    gain = Init(jax.random.key(0), STD, jnp.float32).ones(5)[...]
    np.testing.assert_array_equal(gain, np.ones(5, np.float32))


def test_rms_norm_divides_by_the_root_mean_square(x64, strict_dtypes):
    x, gain = normal(0, 2, 3, 5), normal(1, 5)
    rms = np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True) + 0.1)
    assert_close(rms_norm(x, gain, 0.1), x / rms * gain[None, None], FLOAT64)


@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
def test_rms_norm_in_bfloat16_is_the_float32_one_rounded_once(strict_dtypes, scale: float):
    x = (normal(0, 2, 3, 64) * scale).astype(jnp.bfloat16)
    gain = normal(1, 64)
    norm = compiled(lambda x: rms_norm(x, gain, 1e-30))
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_swiglu_in_bfloat16_is_the_float32_one_rounded_once(strict_dtypes):
    gate_up = normal(0, 2, 50).astype(jnp.bfloat16)
    wide = compiled(swiglu)(gate_up.astype(jnp.float32))
    np.testing.assert_array_equal(compiled(swiglu)(gate_up), wide.astype(jnp.bfloat16))


def plain_norm(x, gain):
    return x * (jnp.square(x).mean(-1, keepdims=True) + 0.1) ** -0.5 * gain[None, None]


def plain_swiglu(gate_up, factor):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up * factor


@pytest.mark.parametrize(
    ("function", "plain", "args"),
    [
        (lambda x, gain: rms_norm(x, gain, 0.1), plain_norm, [(2, 3, 5), (5,)]),
        (swiglu, plain_swiglu, [(6, 10), (6, 1)]),
        (lambda x: swiglu(x), lambda x: plain_swiglu(x, 1.0), [(2, 3, 10)]),
    ],
    ids=["norm", "swiglu with factors", "swiglu"],
)
def test_derivative_rules_are_those_of_the_formula(x64, strict_dtypes, function, plain, args):
    args = [normal(i, *shape) for i, shape in enumerate(args)]

    def value_and_gradients(f, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(jnp.cos(y))

    expected = compiled(partial(value_and_gradients, plain))(*args)
    assert_close(compiled(partial(value_and_gradients, function))(*args), expected, FLOAT64)


def test_feed_forward_is_swiglu_between_three_products(x64, strict_dtypes):
    init = Init(jax.random.key(0), STD, jnp.dtype(jnp.float64))
    ffn, x = random_module(lambda: FeedForward(5, 7, init=init)), normal(0, 2, 3, 5)
    gate, up, down = (np.asarray(w[...]) for w in (ffn.w_gate_DF, ffn.w_up_DF, ffn.w_down_FD))
    assert_close(ffn(x), (silu(x @ gate) * (x @ up)) @ down, FLOAT64)
