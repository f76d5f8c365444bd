"""Multi-token prediction (report 2.2, Eq. 21-25).

Depth k takes the hidden state of depth k - 1 at position i and the embedding of token i + k, and
predicts token i + k + 1. The released weights concatenate [norm(embedding); norm(hidden)], the
reverse of Eq. 21; so do we. Hidden states enter after the final norm of the depth before (the
main model's for depth 1), which the report leaves open. Embedding and head belong to the main
model and come in as arguments.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block
from dsv3_jax.model.layers import Init, rms_norm
from dsv3_jax.model.router import RouterStats
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.sequence import RowShards
from dsv3_jax.quant.gemm import linear


class MTP(nnx.Module):
    """One depth: combine, one MoE layer, norm."""

    def __init__(self, cfg: ModelConfig, *, init: Init) -> None:
        self.eps = cfg.rms_eps
        self.embed_norm_D = init.ones(cfg.d_model)
        self.hidden_norm_D = init.ones(cfg.d_model)
        self.w_proj_DD_D = init.normal("w_proj_DD_D", 2 * cfg.d_model, cfg.d_model)
        self.block = Block(cfg, moe=True, init=init.at("block"))
        self.norm_D = init.ones(cfg.d_model)

    def __call__(
        self,
        h_BTD: jax.Array,
        embedded_BTD: jax.Array,
        rope_BTR: jax.Array,
        valid_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        plan: ExchangePlan | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Hidden states of the depth before and embedded tokens i + k -> normed hidden states."""
        x_BTD = self.combined(h_BTD, embedded_BTD)
        x_BTD, stats = self.block(x_BTD, rope_BTR, valid_BT, segments_BT, plan)
        return self.normed(x_BTD), stats

    def combined(self, h_BTD: jax.Array, embedded_BTD: jax.Array) -> jax.Array:
        """The block's input (Eq. 21)."""
        embedded_BTD = rms_norm(embedded_BTD, self.embed_norm_D[...], self.eps)
        h_BTD = rms_norm(h_BTD, self.hidden_norm_D[...], self.eps)
        return linear(jnp.concatenate([embedded_BTD, h_BTD], -1), self.w_proj_DD_D[...])

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """Behind the block."""
        return rms_norm(x_BTD, self.norm_D[...], self.eps)


def same_segment(
    segments_BT: jax.Array | None, places: int, shards: RowShards | None = None
) -> jax.Array | bool:
    """bool [B, T]: whether the token `places` further on is of the same segment; all, without."""
    if segments_BT is None:
        return True
    return segments_BT == shift_left(segments_BT, places, -1, shards)


def shift_left(
    x_BT: jax.Array, places: int, fill: int, shards: RowShards | None = None
) -> jax.Array:
    """x[i + places] at i, `fill` where the row has ended. With `shards`, x is this device's part of
    rows, and so is the result.
    """
    if shards:
        return shards.own(shift_left(shards.whole(x_BT), places, fill))
    return jnp.pad(x_BT[:, places:], ((0, 0), (0, places)), constant_values=fill)
