"""One layer on the residual stream, and what its backward pass keeps (report 2, 3.2.3)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.fused_attention import FORWARD
from dsv3_jax.model.layers import FeedForward, Init, rms_norm
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.router import RouterStats
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.dispatch import RECEIVED
from dsv3_jax.quant.fp8_gemm import ACTIVATION_INPUT

Remat = Literal["none", "report", "full"]

# The report recomputes RMSNorms and MLA up-projections; SwiGLU's output is recomputed as well
# (3.3.3). The router's choice is kept: a near-tie decided otherwise the second time would pair the
# backward pass's gates with other experts than the forward pass's.
KEPT_BY_REPORT = (
    "residual",
    "mla_q_latent",
    "mla_kv_latent",
    "attention_out",
    "attention_lse",
    ACTIVATION_INPUT,
    "router_scores",
    "router_experts",
    "moe_layout",
    RECEIVED,
)


class Block(nnx.Module):
    """x += MLA(norm(x)); x += FFN(norm(x)), where FFN is dense or a mixture of experts."""

    def __init__(self, cfg: ModelConfig, *, moe: bool, init: Init) -> None:
        self.eps = cfg.rms_eps
        self.attention_norm_D = init.ones(cfg.d_model)
        self.mla = MLA(cfg, init=init.at("mla"))
        self.ffn_norm_D = init.ones(cfg.d_model)
        if moe:
            self.moe = MoE(cfg, init=init.at("moe"))
        else:
            self.dense = FeedForward(cfg.d_model, cfg.dense_hidden, init=init.at("dense"))

    def __call__(
        self,
        x_BTD: jax.Array,
        rope_BTR: jax.Array,
        valid_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        plan: ExchangePlan | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """The stream after this layer, and its router's statistics (None for a dense layer).

        With a `plan`, experts are spread over devices and rows may be, within a `shard_map`.
        """
        normed_BTD = rms_norm(x_BTD, self.attention_norm_D[...], self.eps)
        x_BTD += self.mla(normed_BTD, rope_BTR, segments_BT, plan and plan.rows)
        return self.feed_forward(checkpoint_name(x_BTD, "residual"), valid_BT, plan)

    def feed_forward(
        self, x_BTD: jax.Array, valid_BT: jax.Array, plan: ExchangePlan | None = None
    ) -> tuple[jax.Array, RouterStats | None]:
        """The second half: x + FFN(norm(x))."""
        normed_BTD = rms_norm(x_BTD, self.ffn_norm_D[...], self.eps)
        if hasattr(self, "dense"):
            return x_BTD + self.dense(normed_BTD), None
        y_BTD, stats = self.moe(normed_BTD, valid_BT, plan)
        return x_BTD + y_BTD, stats


def rematerialised(layer: Callable, remat: Remat, *, scanned: bool) -> Callable:
    """`layer` with its backward pass's memory policy.

    "none" keeps all, "report" recomputes as the report does, "full" keeps the input alone. Outside
    of a scan's loop, the compiler must be told not to merge the recomputation with the forward
    pass.
    """
    if remat == "none":
        return layer
    policy = _kept_by_report if remat == "report" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)


def _kept_by_report(primitive: Any, *args: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: whether an equation's results are kept."""
    named = jax.checkpoint_policies.save_only_these_names(*KEPT_BY_REPORT)
    return primitive.name == FORWARD or named(primitive, *args, **params)
