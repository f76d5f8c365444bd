"""The latent cache: C + R values per token and layer, nothing else (report 2.1.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig


class Cache(NamedTuple):
    """c_kv [L, B, S, C] and k_R [L, B, S, R] of every main layer."""

    c_kv_LBSC: jax.Array
    k_rope_LBSR: jax.Array


def empty_cache(cfg: ModelConfig, rows: int, length: int, dtype: jnp.dtype) -> Cache:
    """Zeros for `rows` sequences of up to `length` tokens."""
    shape = (cfg.num_layers, rows, length)
    return Cache(
        jnp.zeros((*shape, cfg.kv_latent), dtype), jnp.zeros((*shape, cfg.rope_dim), dtype)
    )
