"""Experts as an engine serves them: tokens that are not there go to none."""

from functools import partial

import jax
import jax.numpy as jnp

from dsv3_jax.model.moe import MoE, Weights, experts
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.dispatch import exchange
from dsv3_jax.parallel.wire import wire_of


def served_experts(
    moe: MoE,
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    plan: ExchangePlan | None,
    placement: None,
    shared_as_routed: bool,
) -> tuple[jax.Array, jax.Array]:
    """Shared plus gated routed experts, and the load int32 [E] of valid tokens."""
    routing, stats = moe.router(x_BTD, valid_BT)
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    nobody = moe.router.cfg.num_experts
    experts_BTK = jnp.where(valid_BT[..., None], routing.experts_BTK, nobody)
    experts_TK = experts_BTK.reshape(len(x_TD), -1)
    gates_TK = routing.gates_BTK.reshape(experts_TK.shape)
    weights = Weights(moe.w_gate_EDF[...], moe.w_up_EDF[...], moe.w_down_EFD[...])
    apply = partial(experts, complete=False)
    if plan is None:
        y_TD = apply(x_TD, experts_TK, gates_TK, weights)
    else:
        wire = wire_of(weights.up, weights.down)
        y_TD, _ = exchange(plan, wire, apply, x_TD, experts_TK, gates_TK, weights)
    y_BTD = y_TD.reshape(x_BTD.shape)
    return (y_BTD if moe.shared is None else y_BTD + moe.shared(x_BTD)), stats.load_E
