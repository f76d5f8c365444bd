"""The choice of a token from its logits: the likeliest, or drawn, from the nucleus or from all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.config.fields import check, check_temperature, check_top_p


class Sampling(NamedTuple):
    """How tokens are chosen; scalars that one compiled program takes as arguments."""

    key: jax.Array
    """Of `jax.random`; with the position it decides what is drawn"""
    temperature: jax.Array
    """float32, divides the logits; 0 takes the likeliest token"""
    top_p: jax.Array
    """float32 above 0: the likeliest tokens of this total probability are drawn from; 1 for all"""


class RowSampling(NamedTuple):
    """How each of B rows chooses: as `Sampling`, with a seed instead of its key."""

    seed_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array


def check_sampling(seed: int, temperature: float, top_p: float) -> None:
    """ValueError as of `sampling`."""
    check_temperature("temperature", temperature)
    check_top_p("top-p", top_p)
    check("seed", seed, 0 <= seed < 2**32, "0 to 2^32 - 1")


def sampling(seed: int, temperature: float = 0.0, top_p: float = 1.0) -> Sampling:
    """ValueError for a temperature below 0 and a top_p outside of (0, 1]."""
    check_sampling(seed, temperature, top_p)
    return Sampling(jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))


def choose(logits_BV: jax.Array, position: jax.Array, how: Sampling) -> jax.Array:
    """int32 [B]: a token for each row after the one at `position`. Each row has its own luck."""
    return lax.cond(how.temperature > 0, _draw, _likeliest, logits_BV, position, how)


def _likeliest(logits_BV, position, how):
    return logits_BV.argmax(-1).astype(jnp.int32)


def _draw(logits_BV, position, how):
    logits_BV = tempered(logits_BV, how.temperature, how.top_p)
    key = jax.random.fold_in(how.key, position)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def tempered(logits_XV: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits of what is drawn from; temperature and top_p one for all, or [X, 1]."""
    # Below 1e-6 a quotient of logits could overflow.
    logits_XV = logits_XV / jnp.maximum(temperature, 1e-6).astype(logits_XV.dtype)
    return lax.cond(
        (top_p < 1).any(), nucleus, lambda logits_XV, top_p: logits_XV, logits_XV, top_p
    )


def nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits, -inf outside of the nucleus.

    A token is in it if all that are likelier (of equally likely ones, those of lower ids) have
    less than `top_p` of the probability together. So the likeliest is always in it; with `top_p` 1
    all are, though sums of float32 may reach 1 before the last.
    """
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    p_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    likelier_BV = jnp.pad(jnp.cumsum(p_BV, -1)[:, :-1], ((0, 0), (1, 0)))
    rank_BV = jnp.argsort(order_BV, axis=-1)
    inside_BV = jnp.take_along_axis((likelier_BV < top_p) | (top_p >= 1), rank_BV, axis=-1)
    return jnp.where(inside_BV, logits_BV, -jnp.inf)
