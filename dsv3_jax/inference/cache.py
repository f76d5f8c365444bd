"""The latent cache: C + R values per token and layer, nothing else (report 2.1.1)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Slots of the shortest cache. The next ones double: a text of any length meets few sizes, each of
# which is a program to compile, and a longer cache is never less than half full.
SHORTEST = 256


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
