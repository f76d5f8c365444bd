"""Rotary positions and YaRN (report 4.3).

Pairs are adjacent elements, 2j with 2j+1, as the released weights store them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.quant.wide import wide


def frequencies(cfg: ModelConfig) -> np.ndarray:
    """Radians per position of each rotation pair, float64 [R / 2]."""
    base = cfg.rope_theta ** (-np.arange(0, cfg.rope_dim, 2) / cfg.rope_dim)
    if not cfg.yarn_active:
        return base
    low = max(math.floor(_pair_of_turns(cfg, cfg.yarn.beta_fast)), 0)
    high = min(math.ceil(_pair_of_turns(cfg, cfg.yarn.beta_slow)), cfg.rope_dim - 1)
    span = max(high - low, 0.001)  # beta_fast = beta_slow on a whole pair would divide by zero
    ramp = np.clip((np.arange(cfg.rope_dim // 2) - low) / span, 0, 1)
    return base * (1 - ramp) + base / cfg.yarn.factor * ramp


def _pair_of_turns(cfg: ModelConfig, turns: float) -> float:
    """The (fractional) pair that turns `turns` times over the original length."""
    length = cfg.yarn.original_length / (2 * math.pi * turns)
    return cfg.rope_dim * math.log(length) / (2 * math.log(cfg.rope_theta))


def softmax_scale(cfg: ModelConfig) -> float:
    """Factor on the attention scores: (N + R)^-1/2, times mscale^2 under YaRN."""
    scale = (cfg.nope_dim + cfg.rope_dim) ** -0.5
    if not cfg.yarn_active:
        return scale
    return scale * _mscale(cfg.yarn.factor, cfg.yarn.mscale_all_dim) ** 2


def _mscale(factor: float, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(factor) + 1


def rope_table(cfg: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cosines of every position's R / 2 pairs, then their sines, at least float32."""
    frequency = frequencies(cfg).astype(wide(dtype))[None, None]
    angle = positions_BT.astype(wide(dtype))[..., None] * frequency
    rope_BTR = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
    if not cfg.yarn_active:
        return rope_BTR
    coefficients = cfg.yarn.mscale, cfg.yarn.mscale_all_dim
    mscale, all_dim = (_mscale(cfg.yarn.factor, c) for c in coefficients)
    return rope_BTR * (mscale / all_dim)


def rotate(x_BTHR: jax.Array, rope_BTR: jax.Array) -> jax.Array:
    """Turns each pair of the last dimension by its position's angle; result in x's dtype."""
    cos, sin = jnp.split(rope_BTR[:, :, None], 2, axis=-1)
    pairs = x_BTHR.astype(rope_BTR.dtype).reshape(*x_BTHR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x_BTHR.shape).astype(x_BTHR.dtype)
