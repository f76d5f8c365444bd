"""The router: sigmoid scores, node-limited top-K, loss-free balancing (report 2.1.2, Eq. 12-20).

The bias enters the choice of experts and never the gates. It is no parameter: `RouterBias` is a
variable of its own type, so that the optimiser, its weight decay and the gradient never see it;
`updated_bias` moves it once per step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Init
from dsv3_jax.model.router_product import fits, router_product
from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.sequence import RowShards
from dsv3_jax.quant.wide import wide


class RouterBias(nnx.Variable):
    """b of Eq. 16, at least float32 [E]."""


class Routing(NamedTuple):
    """Where tokens go: experts int32 [B, T, K] and their gates [B, T, K], at least float32."""

    experts_BTK: jax.Array
    gates_BTK: jax.Array


class RouterStats(NamedTuple):
    """What the trainer needs of a router.

    int32 load [E] over valid tokens; balance = mean over rows of sum f P (Eq. 17 without alpha);
    and what an exchange between devices took, if there was one.
    """

    load_E: jax.Array
    balance: jax.Array
    traffic: Traffic | None = None


class Router(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, init: Init) -> None:
        self.cfg = cfg
        self.w_DE = init.normal("w_DE", cfg.d_model, cfg.num_experts)
        self.bias_E = RouterBias(jnp.zeros(cfg.num_experts, wide(init.dtype)))

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, shards: RowShards | None = None
    ) -> tuple[Routing, RouterStats]:
        """Routes every token; tokens that are not valid (bool) are left out of the statistics. With
        `shards` these are this device's parts of rows; the balance is that of the whole rows.
        """
        cfg, high = self.cfg, wide(x_BTD.dtype)
        w_DE = self.w_DE[...].astype(high)
        if fits(x_BTD):
            logits_BTE = router_product(x_BTD, w_DE)
        else:  # HIGHEST: a TPU would round the operands to bfloat16, a GPU to TF32.
            logits_BTE = jnp.einsum(
                "btd,de->bte", x_BTD.astype(high), w_DE, precision=lax.Precision.HIGHEST
            )
        s_BTE = checkpoint_name(jax.nn.sigmoid(logits_BTE), "router_scores")
        biased_BTE = s_BTE + self.bias_E[...].astype(high)[None, None]
        experts_BTK = checkpoint_name(choose_experts(biased_BTE, cfg), "router_experts")
        gates_BTK = jnp.take_along_axis(s_BTE, experts_BTK, axis=-1)
        gates_BTK = gates_BTK / (gates_BTK.sum(-1, keepdims=True) + 1e-20) * cfg.gate_scale
        chosen_BTE = _membership(experts_BTK, cfg.num_experts) & valid_BT[..., None]
        counted_BTE = chosen_BTE
        if cfg.balance_indicator == "scores":
            top_BTK = lax.top_k(s_BTE, cfg.experts_per_token)[1]
            counted_BTE = _membership(top_BTK, cfg.num_experts) & valid_BT[..., None]
        balance = balance_loss(s_BTE, counted_BTE, valid_BT, cfg.experts_per_token, shards)
        load_E = chosen_BTE.sum((0, 1), dtype=jnp.int32)
        return Routing(experts_BTK, gates_BTK), RouterStats(load_E, balance)


def choose_experts(biased_BTE: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Ids [B, T, K] of the best K experts in the best groups (score: sum of a group's best two)."""
    if cfg.num_groups > cfg.num_kept_groups:
        # [B, T, G, E / G]
        grouped_BTGE = biased_BTE.reshape(*biased_BTE.shape[:2], cfg.num_groups, -1)
        group_score_BTG = lax.top_k(grouped_BTGE, 2)[0].sum(-1)
        best_BTK = lax.top_k(group_score_BTG, cfg.num_kept_groups)[1]
        kept_BTG = _membership(best_BTK, cfg.num_groups)
        masked_BTGE = jnp.where(kept_BTG[..., None], grouped_BTGE, float(cfg.masked_score))
        biased_BTE = masked_BTGE.reshape(biased_BTE.shape)
    return lax.top_k(biased_BTE, cfg.experts_per_token)[1]


def balance_loss(
    s_BTE: jax.Array,
    counted_BTE: jax.Array,
    valid_BT: jax.Array,
    experts_per_token: int,
    shards: RowShards | None = None,
) -> jax.Array:
    """Mean over rows of sum_i f_i P_i, Eq. 17-20 without alpha: 1 under uniform load.

    Rows without a valid token count 0.
    """
    of_row = shards.sum if shards else lambda x: x
    tokens_B = jnp.maximum(of_row(valid_BT.sum(-1)), 1).astype(s_BTE.dtype)
    f_BE = of_row(counted_BTE.sum(1)).astype(s_BTE.dtype)
    f_BE = f_BE * s_BTE.shape[-1] / (experts_per_token * tokens_B[:, None])
    share_BTE = s_BTE / (s_BTE.sum(-1, keepdims=True) + 1e-20)
    share_BTE *= valid_BT[..., None].astype(s_BTE.dtype)
    p_BE = of_row(share_BTE.sum(1)) / tokens_B[:, None]
    return (f_BE * p_BE).sum(-1).mean()


def updated_bias(bias_E: jax.Array, load_E: jax.Array, speed: jax.Array) -> jax.Array:
    """b + speed * sign(mean load - load), with the step's global load; layers may lead both."""
    load_E = load_E.astype(bias_E.dtype)
    return bias_E + speed * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def max_violation(load_LE: jax.Array) -> jax.Array:
    """MaxVio of each layer: max load / mean load - 1. -> float32 [L]."""
    load_LE = load_LE.astype(jnp.float32)
    # A mean is 0 or at least 1 / E; without a token the result is -1.
    return load_LE.max(-1) / jnp.maximum(load_LE.mean(-1), 1 / load_LE.shape[-1]) - 1


def _membership(ids_BTK: jax.Array, size: int) -> jax.Array:
    """bool [B, T, size]: whether each of 0..size-1 is among the ids."""
    return (ids_BTK[..., None] == jnp.arange(size, dtype=ids_BTK.dtype)[None, None, None]).any(-2)
