"""Rotary positions and YaRN: the published numbers, and what a rotation must keep."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.model import yarn
from dsv3_jax.model.yarn import frequencies, softmax_scale
from tests.shapes import compiled, normal, tiny_model
from tests.tolerances import FLOAT64, assert_close

PLAIN = ModelConfig(max_length=4096)
EXTENDED = ModelConfig(max_length=163840)
# Each a program of one piece: their operations one by one take longer to compile.
rope_table, rotate = compiled(yarn.rope_table, static_argnums=(0, 2)), compiled(yarn.rotate)


def test_frequencies_without_yarn_are_powers_of_theta():
    expected = [10000 ** (-2 * j / 64) for j in range(32)]
    np.testing.assert_allclose(frequencies(PLAIN), expected, rtol=1e-14)


def test_yarn_is_inactive_at_the_original_length_and_for_factor_one():
    assert not PLAIN.yarn_active
    assert ModelConfig(max_length=4097).yarn_active
    off = replace(EXTENDED, yarn=YarnConfig(factor=1.0))
    np.testing.assert_array_equal(frequencies(off), frequencies(PLAIN))
    assert softmax_scale(off) == softmax_scale(PLAIN)


@pytest.mark.parametrize(
    ("pair", "expected"), [(10, 0.0562341), (11, 0.0390069), (16, 0.0055), (23, 3.3338e-5)]
)
def test_yarn_frequencies_of_the_released_model(pair: int, expected: float):
    np.testing.assert_allclose(frequencies(EXTENDED)[pair], expected, rtol=2e-5)


def test_yarn_keeps_pairs_up_to_10_and_slows_pairs_from_23_by_the_factor():
    plain, extended = frequencies(PLAIN), frequencies(EXTENDED)
    np.testing.assert_array_equal(extended[:11], plain[:11])
    np.testing.assert_allclose(extended[23:], plain[23:] / 40, rtol=1e-14)
    between = extended[11:23] / plain[11:23]
    np.testing.assert_allclose(between, 1 - np.arange(1, 13) / 13 * (39 / 40), rtol=1e-12)


def test_softmax_scales_of_the_released_model():
    np.testing.assert_allclose(softmax_scale(PLAIN), 0.0721688, rtol=1e-6)
    np.testing.assert_allclose(softmax_scale(EXTENDED), 0.1352338, rtol=1e-6)
    mscale = np.sqrt(softmax_scale(EXTENDED) / softmax_scale(PLAIN))
    np.testing.assert_allclose(mscale, 1.3688879, rtol=1e-7)


def test_cos_and_sin_carry_the_ratio_of_the_mscales(x64):
    positions = jnp.arange(3)[None]
    equal = rope_table(EXTENDED, positions, jnp.float64)
    cos, sin = jnp.split(equal, 2, -1)
    np.testing.assert_allclose(cos**2 + sin**2, np.ones((1, 3, 32)), rtol=1e-14)
    uneven = replace(EXTENDED, yarn=YarnConfig(mscale=2.0, mscale_all_dim=0.5))
    ratio = (0.2 * np.log(40) + 1) / (0.05 * np.log(40) + 1)
    np.testing.assert_allclose(
        rope_table(uneven, positions, jnp.float64), equal * ratio, rtol=1e-14
    )


@pytest.mark.parametrize("cfg", [PLAIN, EXTENDED], ids=["plain", "yarn"])
def test_rotation_multiplies_adjacent_elements_as_complex_numbers(x64, strict_dtypes, cfg):
    positions, x = np.array([[0, 1, 7, 4000], [3, 0, 0, 9]]), np.asarray(normal(0, 2, 4, 3, 64))
    actual = rotate(jnp.asarray(x), rope_table(cfg, jnp.asarray(positions), jnp.float64))
    numbers = x[..., 0::2] + 1j * x[..., 1::2]
    turn = np.exp(1j * positions[..., None] * frequencies(cfg))
    turned = numbers * turn[:, :, None]
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    assert_close(actual, expected, FLOAT64)


def test_rotation_keeps_the_norm_of_every_pair(x64):
    x = normal(0, 1, 9, 2, 4)
    turned = rotate(x, rope_table(tiny_model(), jnp.arange(9)[None], jnp.float64))
    before, after = (np.asarray(x).reshape(1, 9, 2, 2, 2) for x in (x, turned))
    assert_close(np.linalg.norm(after, axis=-1), np.linalg.norm(before, axis=-1), FLOAT64)
    assert np.abs(after - before)[:, 1:].min() > 0


def test_scores_depend_on_relative_position_only(x64):
    """One query and one key at positions 905 and 900, 5 and 0, 906 and 900."""
    q, k = (jnp.broadcast_to(normal(seed, 1, 1, 1, 64), (1, 3, 1, 64)) for seed in (0, 1))
    tables = (
        rope_table(EXTENDED, jnp.asarray([at]), q.dtype) for at in ([905, 5, 906], [900, 0, 900])
    )
    turned = [rotate(x, table) for x, table in zip((q, k), tables, strict=True)]
    far, near, other = np.asarray(turned[0] * turned[1]).sum((0, 2, 3))
    np.testing.assert_allclose(far, near, rtol=1e-10)
    assert abs(other - near) > 1e-3


@pytest.mark.parametrize(("dtype", "table"), [("bfloat16", "float32"), ("float64", "float64")])
def test_angles_are_at_least_float32_and_results_keep_their_dtype(
    x64, strict_dtypes, dtype: str, table: str
):
    made = rope_table(tiny_model(), jnp.arange(3)[None], jnp.dtype(dtype))
    assert made.dtype == table
    assert rotate(jnp.ones((1, 3, 1, 4), dtype), made).dtype == dtype
