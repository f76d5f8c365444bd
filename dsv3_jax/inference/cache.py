"""The latent cache: C + R values per token and layer, nothing else (report 2.1.1).

`Cache` holds whole texts of one length, `Pool` pages of slots that texts of any length share.
Letters of pages: `Y` pages, `Z` slots of one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.quant.fp8 import Blocked, quantize

# Slots of the shortest cache. The next ones double: a text of any length meets few sizes, each of
# which is a program to compile, and a longer cache is never less than half full.
SHORTEST = 256
FP8_BLOCK = (1, 128)  # of c_kv: with C = 512, four scales a token


class Cache(NamedTuple):
    """One layer's c_kv [B, S, C] and k_R [B, S, R]: S slots for tokens."""

    c_kv_BSC: jax.Array
    k_rope_BSR: jax.Array


def slots(tokens: int, longest: int) -> int:
    """S of a cache for so many tokens: 256, 512, 1024 ... and at most `longest`."""
    return min(max(SHORTEST, power_of_two(tokens)), longest)


def power_of_two(number: int) -> int:
    """The next one from `number` (1 or more) up."""
    return 1 << (number - 1).bit_length()


def extended(
    cache: tuple[Cache, ...], own: tuple[Cache, ...], position: jax.Array
) -> tuple[Cache, ...]:
    """The cache with one token's latents written at `position`."""
    return jax.tree.map(
        lambda old, new: lax.dynamic_update_slice_in_dim(old, new, position, axis=1), cache, own
    )


@partial(jax.jit, static_argnums=1)
def lengthened(cache: tuple[Cache, ...], length: int) -> tuple[Cache, ...]:
    """Every layer's cache with empty slots added up to `length`."""
    more = length - cache[0].c_kv_BSC.shape[1]
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0))), cache)


# --- pages ---------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """One layer's pages: c_kv [Y, Z, C] and k_R [Y, Z, R], both in the activations' dtype; or c_kv
    in E4M3 with float32 scales [Y, Z, C / 128], which is 656 bytes a token at V3's sizes, not 1152.
    """

    c_kv_YZC: jax.Array | Blocked
    k_rope_YZR: jax.Array

    @property
    def page_slots(self) -> int:
        """Z."""
        return self.k_rope_YZR.shape[1]

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.c_kv_YZC, Blocked)


def empty_pool(cfg: ModelConfig, pages: int, page_slots: int, dtype: jnp.dtype, fp8: bool) -> Pool:
    """Pages of zeros."""
    c_kv_YZC = jnp.zeros((pages, page_slots, cfg.kv_latent), dtype)
    k_rope_YZR = jnp.zeros((pages, page_slots, cfg.rope_dim), dtype)
    return Pool(quantize(c_kv_YZC, FP8_BLOCK) if fp8 else c_kv_YZC, k_rope_YZR)


def read(pool: Pool, table_BY: jax.Array, before_B: jax.Array) -> Cache:
    """The latents of pages in the order of a table (int32), Y * Z slots of each row; zeros from
    slot `before` on, whatever is there: a weight of 0 does not make NaN harmless.
    """

    def of_rows(x_YZC: jax.Array) -> jax.Array:
        x_BYZC = x_YZC[table_BY]
        return x_BYZC.reshape(len(table_BY), -1, x_BYZC.shape[-1])

    dtype = pool.k_rope_YZR.dtype
    latents = jax.tree.map(of_rows, pool)
    c_kv_BSC, k_rope_BSR = latents.c_kv_YZC.astype(dtype), latents.k_rope_YZR
    held_BS1 = (jnp.arange(c_kv_BSC.shape[1])[None] < before_B[:, None])[..., None]
    return Cache(jnp.where(held_BS1, c_kv_BSC, 0), jnp.where(held_BS1, k_rope_BSR, 0))


def as_read(own: Cache, pool: Pool) -> Cache:
    """Latents as they will be read once they are written. So a text does not depend on where its
    chunks ended.
    """
    if not pool.is_fp8:
        return own
    c_kv_BSC = quantize(own.c_kv_BSC, FP8_BLOCK).dequantize(own.c_kv_BSC.dtype)
    return own._replace(c_kv_BSC=c_kv_BSC)


def written(
    pool: Pool, own: Cache, table_BY: jax.Array, position_BT: jax.Array, live_BT: jax.Array
) -> Pool:
    """The pool with latents [B, T, ...] at their rows' positions; those not live stay out.

    No two live ones may have one place.
    """
    size = pool.page_slots
    page_BT = jnp.take_along_axis(table_BY, position_BT // size, axis=1, mode="clip")
    nowhere = pool.k_rope_YZR.shape[0] * size
    slot_BT = jnp.where(live_BT, page_BT * size + position_BT % size, nowhere)
    slot_X = slot_BT.reshape(-1)

    def put(x_YZC: jax.Array, own_BTC: jax.Array) -> jax.Array:
        flat_SC = x_YZC.reshape(-1, x_YZC.shape[-1])
        own_XC = own_BTC.reshape(-1, own_BTC.shape[-1])
        return flat_SC.at[slot_X].set(own_XC, mode="drop").reshape(x_YZC.shape)

    c_kv_BSC = quantize(own.c_kv_BSC, FP8_BLOCK) if pool.is_fp8 else own.c_kv_BSC
    return jax.tree.map(put, pool, Pool(c_kv_BSC, own.k_rope_BSR))
