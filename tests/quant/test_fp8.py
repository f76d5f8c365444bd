"""Blocks and scales against a loop over blocks in NumPy, bit for bit; weights in FP8 in a model."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.generate import decode
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quant.fp8 import Blocked, fake_quantize, grid, quantize, retile, scaled
from dsv3_jax.quant.gemm import grouped_linear, linear
from tests.quant.number_tables import TABLES, nearest
from tests.shapes import compiled, normal, random_model, random_tokens, tiny_model
from tests.tolerances import FLOAT32, assert_close

E4M3 = ml_dtypes.float8_e4m3fn
TINY = np.finfo(np.float32).tiny
RAGGED = [((128, 128), (200, 300)), ((128, 128), (5, 7)), ((1, 128), (3, 129)), ((4, 3), (2, 9, 8))]


def quantize_by_loop(x: np.ndarray, block: tuple[int, int], pow2: bool) -> tuple:
    """Values and scales of a matrix, one block at a time."""
    values, scales = np.zeros(x.shape, E4M3), np.zeros(grid(x.shape, block), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax = np.abs(x[at]).max()
            scale = max(amax * np.float32(1 / 448), TINY) if amax else np.float32(1)
            if pow2 and amax:
                mantissa, exponent = np.frexp(max(float(amax) / 448, TINY))  # in [0.5, 1)
                scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
            scales[i, j] = scale
            values[at] = np.clip(x[at] / scale, -448, 448).astype(E4M3)
    return values, scales


def dequantize_by_loop(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]):
    """One element at a time, of a matrix."""
    wide = values.astype(np.float32)
    return np.array(
        [[wide[i, j] * scales[i // block[0], j // block[1]] for j in range(wide.shape[1])]
         for i in range(wide.shape[0])]
    )  # fmt: skip


def matrices(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])


@pytest.mark.parametrize("scale", ["float32", "pow2"])
@pytest.mark.parametrize(("block", "shape"), RAGGED)
def test_quantize_is_the_loop_over_blocks(block, shape, scale: str):
    """Magnitudes from 2^-40 to 2^40, so that no two blocks could share a scale by luck."""
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(shape) * 2.0 ** draw.integers(-40, 40, shape)).astype(np.float32)
    run = compiled(quantize, static_argnames=("block", "scale"))
    blocked = run(jnp.asarray(x), block=block, scale=scale)
    assert (blocked.shape, blocked.dtype, blocked.block) == (shape, E4M3, block)
    assert blocked.scales.shape == grid(shape, block)
    for i, matrix in enumerate(matrices(x)):
        values, scales = quantize_by_loop(matrix, block, scale == "pow2")
        assert np.array_equal(matrices(np.asarray(blocked.scales))[i], scales)
        assert np.array_equal(matrices(np.asarray(blocked.values))[i], values)


@pytest.mark.parametrize("scale", ["float32", "pow2", "mx"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m6"])
@pytest.mark.parametrize(("block", "shape"), RAGGED)
def test_rounding_without_stored_numbers_is_the_same_to_the_bit(block, shape, fmt, scale):
    x = np.array(normal(0, *shape)) * 2.0 ** np.array(10 * normal(1, *shape)).round()
    x[..., 1, 1], x[..., 2, 3], x[..., 0, :] = np.nan, np.inf, 0
    x = x.astype(np.float32)

    def both(x):
        return fake_quantize(x, block, fmt, scale), quantize(x, block, fmt, scale).dequantize()

    actual, expected = (np.asarray(y) for y in compiled(both)(x))
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    finite = ~np.isnan(expected)
    assert np.array_equal(actual[finite].view(np.uint32), expected[finite].view(np.uint32))


@pytest.mark.parametrize(("block", "shape"), RAGGED)
def test_dequantize_is_the_loop_over_elements(block, shape):
    values = np.asarray(normal(0, *shape)).astype(E4M3)
    scales = np.abs(np.asarray(normal(1, *grid(shape, block)))).astype(np.float32)
    blocked = Blocked(jnp.asarray(values), jnp.asarray(scales), block)
    expected = [dequantize_by_loop(*pair, block) for pair in zip(matrices(values), matrices(scales),
                                                                 strict=True)]  # fmt: skip
    actual = compiled(lambda b: (b.dequantize(), b.dequantize(jnp.bfloat16)))(blocked)
    assert np.array_equal(actual[0], np.reshape(expected, shape))
    rounded = np.reshape(expected, shape).astype(ml_dtypes.bfloat16)
    assert np.array_equal(actual[1].view(jnp.uint16), rounded.view(np.uint16))


def test_every_e4m3_number_comes_back_from_every_power_of_two_scale():
    """448 in each block makes the scale exact, so quantising again changes no bit."""
    codes = np.arange(256, dtype=np.uint8).view(E4M3)
    finite = codes[np.isfinite(codes.astype(np.float32))]
    x = finite.astype(np.float32)[None] * np.float32(2.0) ** np.arange(-100, 100, 7)[:, None]
    blocked = quantize(jnp.asarray(x, jnp.float32), (1, 256), scale="pow2")
    assert np.array_equal(np.asarray(blocked.values).view(np.uint8),
                          np.broadcast_to(finite.view(np.uint8), x.shape))  # fmt: skip


def test_quotients_are_divisions():
    """Every bfloat16 number from 1 to 2 as the largest of a block, beside many others: a product
    with the inverse would round some to another number.
    """
    numbers = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    largest = numbers[(numbers >= 1) & (numbers < 2)]
    others = numbers[(numbers > 2.0**-19) & (numbers < 1)]
    x = np.stack(np.meshgrid(largest, others), -1).reshape(-1, 2)
    scales = x[:, :1] * np.float32(1 / 448)
    expected = (x / scales).astype(E4M3).astype(np.float32) * scales
    assert np.array_equal(compiled(fake_quantize)(x), expected)
    assert np.array_equal(compiled(lambda x: quantize(x).dequantize())(x), expected)


@pytest.mark.parametrize("fmt", TABLES)
@pytest.mark.parametrize("scale", ["pow2", "mx"])
def test_the_largest_floats_stay_finite(fmt: str, scale: str):
    x = np.array([[np.finfo(np.float32).max, 1.0, -3.3e38]], np.float32)
    back = compiled(lambda x: quantize(x, (1, 4), fmt, scale).dequantize())(x)
    assert np.isfinite(back).all()
    assert (np.abs(np.asarray(back)[0, ::2]) > 1.6e38).all()


def test_by_scales_of_others_what_is_finite_is_saturated():
    """Even where the quotient is beyond float32."""
    x = jnp.asarray([[3e38, 1.0, -3e38, jnp.inf]], jnp.float32)
    blocked = compiled(lambda x: scaled(x, jnp.full((1, 1), 2.0**-120), (1, 4)))(x)
    values = np.asarray(blocked.values).astype(np.float32)[0]
    assert values[:3].tolist() == [448, 448, -448]
    assert np.isnan(values[3])


@pytest.mark.parametrize("scale", ["float32", "pow2"])
def test_edges_of_the_range(scale: str):
    """Zeros: scale 1. Tiny: normal scale. NaN, infinity: in their place alone. Large: finite."""
    x = np.ones((5, 4), np.float32)
    x[0], x[1], x[2, 1], x[3, 2], x[4] = 0, 2e-38, np.nan, np.inf, 3e38
    run = compiled(lambda x: quantize(x, (1, 4), scale=scale))
    blocked = run(x)
    scales, back = np.asarray(blocked.scales)[:, 0], np.asarray(blocked.dequantize())
    assert scales[0] == 1
    assert not back[0].any()
    assert scales[1] == TINY
    assert scales[2] == scales[3] == run(np.ones((5, 4), np.float32)).scales[0, 0]
    assert np.argwhere(np.isnan(back)).tolist() == [[2, 1], [3, 2]]
    assert np.isfinite(back[4]).all()
    if scale == "pow2":
        assert (np.asarray(blocked.scales).view(np.int32) & 0x7FFFFF == 0).all()


def test_other_formats_and_scales_are_refused():
    with pytest.raises(ValueError, match="fmt is 'e3m4'; allowed: 'e4m3', 'e5m2', 'e5m6', 'hif8'"):
        quantize(jnp.ones((2, 2)), fmt="e3m4")
    with pytest.raises(ValueError, match="scale is 'int'; allowed: 'float32', 'pow2', 'mx'"):
        quantize(jnp.ones((2, 2)), scale="int")
    with pytest.raises(ValueError, match=r"block is \(0, 128\); allowed: sizes of at least 1"):
        quantize(jnp.ones((2, 2)), (0, 128))


@pytest.mark.parametrize("scale", ["float32", "pow2", "mx"])
@pytest.mark.parametrize("fmt", TABLES)
def test_every_format_in_blocks_is_the_nearest_number_times_the_scale(fmt: str, scale: str):
    """Blocks of 32 as MX formats have them, the last one short."""
    draw = np.random.default_rng(2)
    x = (draw.standard_normal((6, 70)) * 2.0 ** draw.integers(-40, 40, (6, 1))).astype(np.float32)
    run = compiled(quantize, static_argnames=("block", "fmt", "scale"))
    blocked = run(x, block=(1, 32), fmt=fmt, scale=scale)
    largest = max(TABLES[fmt].values())
    for start in range(0, 70, 32):
        part = x[:, start : start + 32]
        ratio = np.abs(part).max(1, keepdims=True) / np.float32(largest)
        if scale == "float32":
            s = np.abs(part).max(1, keepdims=True) * np.float32(1 / largest)
        elif scale == "pow2":
            s = np.exp2(np.ceil(np.log2(ratio.astype(float)))).astype(np.float32)
        else:
            powers = [np.floor(np.log2(v)) for v in (np.abs(part).max(1, keepdims=True), largest)]
            s = np.exp2(powers[0] - powers[1]).astype(np.float32)
        np.testing.assert_array_equal(blocked.scales[:, [start // 32]], s)
        rounded = nearest((part / s).ravel(), TABLES[fmt]).reshape(part.shape).astype(np.float32)
        np.testing.assert_array_equal(blocked.dequantize()[:, start : start + 32], rounded * s)


def test_another_tiling_keeps_every_number_that_stays_normal():
    """Powers of two before and after: only exponents move, until a number is below 2^-6."""
    draw = np.random.default_rng(3)
    x = (draw.standard_normal((256, 256)) * 2.0 ** draw.integers(-9, 9, (256, 256))).astype("f4")
    rows = compiled(quantize, static_argnames="scale")(x, scale="pow2")
    columns = compiled(retile, static_argnames="block")(rows, block=(128, 1))
    before, after = (np.asarray(compiled(Blocked.dequantize)(b)) for b in (rows, columns))
    stays = np.abs(before / np.repeat(columns.scales, 128, 0)) >= 2.0**-6
    assert 0.5 < stays.mean() < 0.9
    assert np.array_equal(after[stays], before[stays])
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("scale", ["float32", "pow2"])
def test_a_gradient_of_any_size_loses_as_much(scale: str):
    """No floor under the scale: at 1e-12 of its size it has the same relative error."""
    g = np.asarray(normal(4, 64, 256), np.float32)
    errors = []
    for size in (1.0, 1e-12):
        small = g * np.float32(size)
        back = compiled(lambda x: quantize(x, scale=scale).dequantize())(small)
        errors.append(np.linalg.norm(back - small) / np.linalg.norm(small))
    assert 0.01 < errors[0] < 0.04
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.02)


def test_products_with_a_blocked_weight_are_those_with_the_expanded_one(strict_dtypes):
    """Outputs and gradients of the activations."""
    w = blocked_normal(0, 4, 130, 7)
    x, dy = (normal(i, 6, size).astype(jnp.bfloat16) for i, size in ((1, 130), (2, 7)))
    expert_x = jnp.asarray([2, 0, 2], jnp.int32)

    def run(x, w, dy):
        plain = w.dequantize(jnp.bfloat16)
        outcomes = []
        for weight in (w, plain):
            one, pull_one = jax.vjp(lambda x, w=weight[1]: linear(x, w), x)
            all_, pull_all = jax.vjp(lambda x, w=weight: grouped_linear(x, expert_x, w), x)
            outcomes.append((one, all_, pull_one(dy), pull_all(dy)))
        return outcomes

    actual, expected = compiled(run)(x, w, dy)
    assert actual[0].dtype == actual[1].dtype == jnp.bfloat16
    assert_close(actual, expected, 0.0)


def blocked_normal(seed: int, *shape: int) -> Blocked:
    values = np.asarray(normal(seed, *shape)).astype(E4M3)
    scales = 0.1 + np.asarray(normal(seed + 1, *grid(shape)), np.float32) ** 2
    return Blocked(jnp.asarray(values), jnp.asarray(scales))


def with_blocked_linears(model: DeepSeekV3) -> DeepSeekV3:
    """The model with random linears in FP8: attention, feed-forward, experts."""

    def convert(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        is_linear = path[0] in ("dense_layers", "moe_layers") and str(path[-1]).startswith("w_")
        if not is_linear or "router" in path:
            return variable
        return variable.replace(blocked_normal(len(str(path)), *variable.shape))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(convert, state))


def expanded(model: DeepSeekV3) -> DeepSeekV3:
    return jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, Blocked) else x,
        model,
        is_leaf=lambda x: isinstance(x, Blocked),
    )


def test_a_model_of_blocked_linears_computes_what_the_expanded_one_does():
    """Under jit and the scans over stacked layers, naive and absorbed."""
    cfg = tiny_model(d_model=130, mtp_depth=0)
    model = with_blocked_linears(random_model(cfg))
    assert isinstance(model.moe_layers.moe.w_up_EDF[...], Blocked)
    empty = Cache(*(jnp.zeros((2, 3, size)) for size in (cfg.kv_latent, cfg.rope_dim)))
    cache = (empty,) * cfg.num_layers

    def run(model, tokens_BT):
        plain = expanded(model)
        pair = (lay_out(m) for m in (model, plain))
        decoded = (decode(w, tokens_BT[:, 0], jnp.int32(0), cache)[0] for w in pair)
        return (model(tokens_BT), plain(tokens_BT), *decoded)

    naive, expected, absorbed, also_expected = compiled(run)(model, random_tokens(cfg, 2, 6))
    assert_close(naive, expected, FLOAT32)
    assert_close(absorbed, also_expected, FLOAT32)
