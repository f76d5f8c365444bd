"""Rows of texts through the layers over paged latents: chunks of prompts, and single tokens.

A chunk's own latents stand apart from the cached ones, so that pools are only read here and can be
written in place when the whole step is done. Parts that pass side by side (two micro-batches of
prompts, report 3.4.1) depend on nothing of each other: the exchange of one can hide behind the
attention of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.cache import Cache, Pool, as_read, read
from dsv3_jax.inference.served_experts import served_experts
from dsv3_jax.inference.weights import Depth, Layer, Weights
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.yarn import rope_table
from dsv3_jax.parallel.buckets import ExchangePlan


@dataclass(frozen=True)
class Experts:
    """How experts are served."""

    plan: ExchangePlan | None = None
    """Of the exchange between devices, of which each holds some"""
    shared_as_routed: bool = False
    """The shared expert lies among the routed ones: K + 1 of them for every token (report 3.4.2)"""


class Part(NamedTuple):
    """T tokens of each of B rows: int32 tokens and positions [B, T], which of them are there (bool
    [B, T]), so many slots [B] that are read of the rows' pages [B, Y].
    """

    token_BT: jax.Array
    position_BT: jax.Array
    live_BT: jax.Array
    before_B: jax.Array
    table_BY: jax.Array


class Passed(NamedTuple):
    """What a part leaves: normed hidden states [B, T, D], latents and loads int32 [E'] of every
    layer (no load of a dense one).
    """

    hidden_BTD: jax.Array
    latents: list[Cache]
    loads: list[jax.Array]


def forward(
    weights: Weights, pools: Sequence[Pool], parts: Sequence[Part], experts: Experts
) -> list[Passed]:
    """Through the main model; `pools` are those of its layers."""
    rest, cfg = weights.rest, weights.rest.cfg
    streams = [rest.embed(part.token_BT) for part in parts]
    ropes = [rope_table(cfg, part.position_BT, streams[0].dtype) for part in parts]
    passed = [Passed(x_BTD, [], []) for x_BTD in streams]
    for layer, pool in zip(weights.layers, pools, strict=True):
        for i, part in enumerate(parts):
            streams[i] = _through(layer, pool, part, streams[i], ropes[i], experts, passed[i])
    return [
        way._replace(hidden_BTD=rest.normed(x_BTD))
        for way, x_BTD in zip(passed, streams, strict=True)
    ]


def through_depth(
    weights: Weights, depth: Depth, pool: Pool, part: Part, h_BTD: jax.Array, experts: Experts
) -> Passed:
    """Through one MTP module: hidden states of the depth before at the part's positions, and the
    part's tokens, which are those `depth` places further on.
    """
    x_BTD = depth.rest.combined(h_BTD, weights.rest.embed(part.token_BT))
    rope_BTR = rope_table(weights.rest.cfg, part.position_BT, x_BTD.dtype)
    passed = Passed(x_BTD, [], [])
    x_BTD = _through(depth.layer, pool, part, x_BTD, rope_BTR, experts, passed)
    return passed._replace(hidden_BTD=depth.rest.normed(x_BTD))


def _through(
    layer: Layer,
    pool: Pool,
    part: Part,
    x_BTD: jax.Array,
    rope_BTR: jax.Array,
    experts: Experts,
    passed: Passed,
) -> jax.Array:
    """The stream behind one layer; notes latents and load."""
    block = layer.block
    normed_BTD = rms_norm(x_BTD, block.attention_norm_D[...], block.eps)
    own = as_read(Cache(*block.mla.latents(normed_BTD, rope_BTR)), pool)
    # As in `read`: whatever a token computes that is not there, NaN would pass a weight of 0.
    own = jax.tree.map(lambda x: jnp.where(part.live_BT[..., None], x, 0), own)
    passed.latents.append(own)
    cached = read(pool, part.table_BY, part.before_B)
    attended = normed_BTD, rope_BTR, own, cached, _seen(part, cached)
    if _absorbs(block.mla.cfg, *cached.c_kv_BSC.shape[1:2], part.token_BT.shape[1]):
        x_BTD += block.mla.absorbed(*attended, layer.expansion)
    else:
        x_BTD += block.mla.naive_on(*attended)
    normed_BTD = rms_norm(x_BTD, block.ffn_norm_D[...], block.eps)
    if hasattr(block, "dense"):
        return x_BTD + block.dense(normed_BTD)
    y_BTD, load_E = served_experts(
        block.moe,
        normed_BTD,
        part.live_BT,
        experts.plan,
        layer.placement,
        experts.shared_as_routed,
    )
    passed.loads.append(load_E)
    return x_BTD + y_BTD


def _seen(part: Part, cached: Cache) -> jax.Array:
    """bool [B, T, S + T]: cached slots, and own tokens up to itself that are there. A token that is
    not there sees itself: what it computes is not used, and must not be NaN.
    """
    tokens = part.token_BT.shape[1]
    slot_S = jnp.arange(cached.c_kv_BSC.shape[1])
    cached_BTS = jnp.broadcast_to(
        slot_S[None, None] < part.before_B[:, None, None],
        (*part.token_BT.shape, len(slot_S)),
    )
    place_T = jnp.arange(tokens)
    itself_1TT = (place_T[:, None] == place_T[None])[None]
    earlier_1TT = (place_T[:, None] > place_T[None])[None]
    return jnp.concatenate(
        [cached_BTS, itself_1TT | (earlier_1TT & part.live_BT[:, None])], axis=-1
    )


def _absorbs(cfg: ModelConfig, cached: int, tokens: int) -> bool:
    """Whether the absorbed form has fewer operations: it scores and sums latents of C where the
    naive one has N and U, but does not expand the cached ones to N + U in each head.
    """
    wide = 2 * cfg.kv_latent + cfg.rope_dim
    narrow = cfg.nope_dim + cfg.rope_dim + cfg.v_dim
    expansion = cfg.kv_latent * (cfg.nope_dim + cfg.v_dim)
    slots = cached + tokens
    # Absorbing turns each query to C and each sum back: the expansion's price for its own tokens.
    return tokens * slots * wide + tokens * expansion < tokens * slots * narrow + slots * expansion
