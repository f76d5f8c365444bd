"""Multi-head latent attention (report 2.1.1, Eq. 1-11).

Two forms of one function. The naive form (training, prefill) expands the latent to keys and
values per head. The absorbed form (decoding) folds the expansion into the query and the output,
so that attention runs over the cached latent itself: one key-value head of width C + R. The cache
holds c_kv after its norm and k_R after its rotation. The two norms on the latents stand in the
released weights and not in the report's equations.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import attention, masked_attention
from dsv3_jax.model.blockwise import blockwise_attention, latent_attention
from dsv3_jax.model.fused_attention import fits, fused_attention
from dsv3_jax.model.layers import Init, rms_norm
from dsv3_jax.model.yarn import rotate, softmax_scale
from dsv3_jax.parallel.sequence import RowShards
from dsv3_jax.quant.gemm import Weight, few_rows_einsum, linear
from dsv3_jax.quant.trained_weight import joined_trained, off_tape, split_trained
from dsv3_jax.quant.wide import wide_einsum

# Tokens of a row, beyond which attention in blocks takes over: chunks take memory with the square
# of the length.
LONGEST_IN_CHUNKS = 4096


class MLA(nnx.Module):
    """Weights are stored as released, fused and head-major; HNR is H heads of N + R columns."""

    def __init__(self, cfg: ModelConfig, *, init: Init) -> None:
        self.cfg = cfg
        d, h, c, r = cfg.d_model, cfg.num_heads, cfg.kv_latent, cfg.rope_dim
        if cfg.q_latent is None:
            self.w_q_D_HNR = init.normal("w_q_D_HNR", d, h * (cfg.nope_dim + r))
        else:
            self.w_dq_DQ = init.normal("w_dq_DQ", d, cfg.q_latent)
            self.q_norm_Q = init.ones(cfg.q_latent)
            self.w_uq_Q_HNR = init.normal("w_uq_Q_HNR", cfg.q_latent, h * (cfg.nope_dim + r))
        self.w_dkv_D_CR = init.normal("w_dkv_D_CR", d, c + r)
        self.kv_norm_C = init.ones(c)
        self.w_ukv_C_HNU = init.normal("w_ukv_C_HNU", c, h * (cfg.nope_dim + cfg.v_dim))
        self.w_o_HU_D = init.normal("w_o_HU_D", h * cfg.v_dim, d)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope_BTR: jax.Array,
        segments_BT: jax.Array | None = None,
        shards: RowShards | None = None,
    ) -> jax.Array:
        """Naive form over whole rows, [B, T, D] -> [B, T, D]; `rope_BTR` from `rope_table`. With
        `shards` these are this device's parts of rows.
        """
        latents = self.latents(x_BTD, rope_BTR)
        if shards is None:
            return self.naive(x_BTD, rope_BTR, *latents, segments_BT)
        q_BTH_NR = jnp.concatenate(self._queries(x_BTD, rope_BTR), -1)
        # One product for each block of keys: none that could be put off as a whole.
        weight = split_trained(off_tape(self.w_ukv_C_HNU[...]))
        expand, scale = partial(_expanded_block, self.cfg), softmax_scale(self.cfg)
        o_BTHU = latent_attention(q_BTH_NR, latents, expand, *weight, scale, shards, segments_BT)
        return linear(o_BTHU.reshape(*x_BTD.shape[:2], -1), self.w_o_HU_D[...])

    def naive(
        self,
        x_BTD: jax.Array,
        rope_BTR: jax.Array,
        c_kv_BSC: jax.Array,
        k_rope_BSR: jax.Array,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """The same with the rows' own latents given, for who wants to keep them."""
        q_BTH_NR = jnp.concatenate(self._queries(x_BTD, rope_BTR), -1)
        k_BSH_NR, v_BSHU = self._keys_and_values(c_kv_BSC, k_rope_BSR)
        args = q_BTH_NR, k_BSH_NR, v_BSHU, softmax_scale(self.cfg)
        if fits(q_BTH_NR, v_BSHU, segments_BT):
            o_BTHU = fused_attention(*args)
        elif x_BTD.shape[1] <= LONGEST_IN_CHUNKS:
            o_BTHU = attention(*args, segments_BT)
        else:
            o_BTHU = blockwise_attention(*args, segments_BT)
        return linear(o_BTHU.reshape(*x_BTD.shape[:2], -1), self.w_o_HU_D[...])

    def naive_on(
        self,
        x_BTD: jax.Array,
        rope_BTR: jax.Array,
        own: tuple[jax.Array, jax.Array],
        cached: tuple[jax.Array, jax.Array],
        seen_BTS: jax.Array,
    ) -> jax.Array:
        """The naive form for T queries over S cached latents and then their own; arguments and
        result as of `absorbed`.
        """
        q_BTH_NR = jnp.concatenate(self._queries(x_BTD, rope_BTR), -1)
        c_kv_BSC, k_rope_BSR = (
            jnp.concatenate(parts, 1) for parts in zip(cached, own, strict=True)
        )
        k_BSH_NR, v_BSHU = self._keys_and_values(c_kv_BSC, k_rope_BSR)
        o_BTHU = masked_attention(q_BTH_NR, k_BSH_NR, v_BSHU, softmax_scale(self.cfg), seen_BTS)
        return linear(o_BTHU.reshape(*x_BTD.shape[:2], -1), self.w_o_HU_D[...])

    def absorbed(
        self,
        x_BTD: jax.Array,
        rope_BTR: jax.Array,
        own: tuple[jax.Array, jax.Array],
        cached: tuple[jax.Array, jax.Array],
        seen_BTS: jax.Array,
        expansion: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """T queries over S cached latents and then the queries' own: [B, T, D] -> [B, T, D].

        Own latents stand apart, so that the cache is only read and can be written in place when
        all is done. `own` and `cached` are as `latents` returns them, `seen` is the mask, bool
        [B, T, S + T], and the weights are those of the method `expansion`.
        """
        q_nope_BTHN, q_rope_BTHR = self._queries(x_BTD, rope_BTR)
        w_uk_HNC, w_uv_HCU = expansion
        q_BTHC = _per_head(q_nope_BTHN, w_uk_HNC)
        b, t, h, c = q_BTHC.shape
        # Heads and queries as rows of one matrix: the cache enters both products as it lies.
        q_B_TH_C, q_rope_B_TH_R = q_BTHC.reshape(b, t * h, c), q_rope_BTHR.reshape(b, t * h, -1)
        score_B_TH_S = jnp.concatenate(
            [
                wide_einsum("bxc,bsc->bxs", q_B_TH_C, c_kv_BSC)
                + wide_einsum("bxr,bsr->bxs", q_rope_B_TH_R, k_rope_BSR)
                for c_kv_BSC, k_rope_BSR in (cached, own)
            ],
            -1,
        )
        score_BTHS = score_B_TH_S.reshape(b, t, h, -1) * softmax_scale(self.cfg)
        p_BTHS = jax.nn.softmax(jnp.where(seen_BTS[:, :, None], score_BTHS, -jnp.inf), axis=-1)
        p_B_TH_S = p_BTHS.astype(x_BTD.dtype).reshape(b, t * h, -1)
        p_cached_B_TH_S, p_own_B_TH_T = jnp.split(p_B_TH_S, [cached[0].shape[1]], axis=-1)
        z_B_TH_C = wide_einsum("bxs,bsc->bxc", p_cached_B_TH_S, cached[0])
        z_B_TH_C += wide_einsum("bxs,bsc->bxc", p_own_B_TH_T, own[0])
        z_BTHC = z_B_TH_C.astype(x_BTD.dtype).reshape(b, t, h, c)
        o_BTHU = _per_head(z_BTHC, w_uv_HCU)
        return linear(o_BTHU.reshape(*x_BTD.shape[:2], -1), self.w_o_HU_D[...])

    def expansion(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """w_ukv as the absorbed form takes it: w_uk [H, N, C] and w_uv [H, C, U], in `dtype`.

        Who decodes many tokens makes them once.
        """
        w_ukv_C_HNU = self.w_ukv_C_HNU[...].astype(dtype)
        w_ukv_CH_NU = w_ukv_C_HNU.reshape(w_ukv_C_HNU.shape[0], self.cfg.num_heads, -1)
        w_uk_CHN, w_uv_CHU = jnp.split(w_ukv_CH_NU, [self.cfg.nope_dim], axis=-1)
        return w_uk_CHN.transpose(1, 2, 0), w_uv_CHU.transpose(1, 0, 2)

    def _keys_and_values(
        self, c_kv_BSC: jax.Array, k_rope_BSR: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return expanded(self.cfg, c_kv_BSC, k_rope_BSR, self.w_ukv_C_HNU[...])

    def latents(self, x_BTD: jax.Array, rope_BTR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the cache holds: c_kv [B, T, C] after its norm, k_R [B, T, R] after rotation."""
        kv_BT_CR = checkpoint_name(linear(x_BTD, self.w_dkv_D_CR[...]), "mla_kv_latent")
        c_kv_BTC, k_rope_BTR = jnp.split(kv_BT_CR, [self.cfg.kv_latent], axis=-1)
        c_kv_BTC = rms_norm(c_kv_BTC, self.kv_norm_C[...], self.cfg.latent_rms_eps)
        return c_kv_BTC, rotate(k_rope_BTR[:, :, None], rope_BTR)[:, :, 0]

    def _queries(self, x_BTD: jax.Array, rope_BTR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q_C [B, T, H, N] and rotated q_R [B, T, H, R]."""
        if self.cfg.q_latent is None:
            q_BT_HNR = linear(x_BTD, self.w_q_D_HNR[...])
        else:
            c_q_BTQ = checkpoint_name(linear(x_BTD, self.w_dq_DQ[...]), "mla_q_latent")
            c_q_BTQ = rms_norm(c_q_BTQ, self.q_norm_Q[...], self.cfg.latent_rms_eps)
            q_BT_HNR = linear(c_q_BTQ, self.w_uq_Q_HNR[...])
        q_BTH_NR = q_BT_HNR.reshape(*x_BTD.shape[:2], self.cfg.num_heads, -1)
        q_nope_BTHN, q_rope_BTHR = jnp.split(q_BTH_NR, [self.cfg.nope_dim], axis=-1)
        return q_nope_BTHN, rotate(q_rope_BTHR, rope_BTR)


def expanded(
    cfg: ModelConfig, c_kv_BSC: jax.Array, k_rope_BSR: jax.Array, w_ukv_C_HNU: Weight
) -> tuple[jax.Array, jax.Array]:
    """Keys [B, S, H, N + R] and values [B, S, H, U] of latents."""
    heads = (*c_kv_BSC.shape[:2], cfg.num_heads)
    kv_BSH_NU = linear(c_kv_BSC, w_ukv_C_HNU).reshape(*heads, -1)
    k_nope_BSHN, v_BSHU = jnp.split(kv_BSH_NU, [cfg.nope_dim], axis=-1)
    k_rope_BSHR = jnp.broadcast_to(k_rope_BSR[:, :, None], (*heads, cfg.rope_dim))
    return jnp.concatenate([k_nope_BSHN, k_rope_BSHR], -1), v_BSHU


def _expanded_block(
    cfg: ModelConfig, latents: tuple[jax.Array, jax.Array], trained: Any, fixed: Any
) -> tuple[jax.Array, jax.Array]:
    return expanded(cfg, *latents, joined_trained(trained, fixed))


def _per_head(x_BTHN: jax.Array, w_HNC: jax.Array) -> jax.Array:
    """Each head's part of x times its own matrix: [B, T, H, N] -> [B, T, H, C]."""
    b, t, h, n = x_BTHN.shape
    x_HXN = x_BTHN.reshape(b * t, h, n).swapaxes(0, 1)
    y_HXC = few_rows_einsum("hxn,hnc->hxc", x_HXN, w_HNC).astype(x_BTHN.dtype)
    return y_HXC.swapaxes(0, 1).reshape(b, t, h, -1)
