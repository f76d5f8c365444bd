"""DeepSeekMoE: shared and routed experts, no token dropped (report 2.1.2, Eq. 12-14).

Token copies are laid out per expert in blocks of equally many rows; each expert's last block may
be part empty. The number of blocks has a static bound that holds for every routing, so nothing is
dropped and nothing grows. The experts are then batched GEMMs over blocks. A copy's gate acts on its
expert's hidden state, before the down-projection: the same sum, and neither the outputs of the
experts are kept for the gates' gradient, nor need they stay apart on their way back.
`dense_experts` is the obvious form that the blocks must equal. Experts on other devices are reached
by `parallel.dispatch`, which brings each device the rows of its own; the shared expert has no part
in that.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import FeedForward, Init
from dsv3_jax.model.router import Router, RouterStats, Routing
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.copies import (
    Copies,
    fill_slots,
    fill_values,
    in_slots,
    running_count,
    sum_copies,
    values_of_copies,
)
from dsv3_jax.parallel.dispatch import Traffic, exchange
from dsv3_jax.parallel.wire import wire_of
from dsv3_jax.quant.gemm import Weight, grouped_linear, linear
from dsv3_jax.quant.swiglu import swiglu
from dsv3_jax.quant.wide import wide

# Rows of a full block: the M of a tensor-core tile, and the K of the FP8 weight gradient.
BLOCK = 128


class Layout(NamedTuple):
    """Token copies in blocks, and int32 the expert of every block."""

    copies: Copies
    expert_x: jax.Array


class Weights(NamedTuple):
    """Of experts: [E, D, F], [E, D, F], [E, F, D]."""

    gate: Weight
    up: Weight
    down: Weight


class MoE(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, init: Init) -> None:
        e, d, f = cfg.num_experts, cfg.d_model, cfg.expert_hidden
        self.router = Router(cfg, init=init.at("router"))
        self.w_gate_EDF = init.normal("w_gate_EDF", e, d, f)
        self.w_up_EDF = init.normal("w_up_EDF", e, d, f)
        self.w_down_EFD = init.normal("w_down_EFD", e, f, d)
        hidden = cfg.num_shared_experts * f
        self.shared = FeedForward(d, hidden, init=init.at("shared")) if hidden else None

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, plan: ExchangePlan | None = None
    ) -> tuple[jax.Array, RouterStats]:
        """Shared plus gated routed experts; statistics over valid tokens (bool [B, T]).

        With a `plan` the experts are spread over devices, within a `shard_map`.
        """
        routing, stats = self.router(x_BTD, valid_BT, plan and plan.rows)
        y_BTD, traffic = self.routed(x_BTD, routing, plan)
        y_BTD = y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)
        return y_BTD, stats._replace(traffic=traffic)

    def routed(
        self, x_BTD: jax.Array, routing: Routing, plan: ExchangePlan | None = None
    ) -> tuple[jax.Array, Traffic | None]:
        """sum_k gate_k E_k(x) over each token's experts, and what an exchange took."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts_TK = routing.experts_BTK.reshape(len(x_TD), -1)
        gates_TK = routing.gates_BTK.reshape(experts_TK.shape)
        weights = Weights(self.w_gate_EDF[...], self.w_up_EDF[...], self.w_down_EFD[...])
        if plan is None:
            y_TD, traffic = experts(x_TD, experts_TK, gates_TK, weights), None
        else:
            wire = wire_of(weights.up, weights.down)
            apply = partial(experts, complete=False)
            y_TD, traffic = exchange(plan, wire, apply, x_TD, experts_TK, gates_TK, weights)
        return y_TD.reshape(x_BTD.shape), traffic

    def dense_experts(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """`routed` the slow way: every expert computes every token."""
        y_BTD = jnp.zeros(x_BTD.shape, wide(x_BTD.dtype))
        for e in range(self.w_gate_EDF.shape[0]):
            gate_up_BT_FF = linear(x_BTD, self.w_gate_EDF[e], self.w_up_EDF[e])
            y_e_BTD = linear(gate_up_BT_FF, self.w_down_EFD[e], activation=swiglu)
            gate_BT = jnp.where(routing.experts_BTK == e, routing.gates_BTK, 0).sum(-1)
            y_BTD += y_e_BTD * gate_BT[..., None]
        return y_BTD.astype(x_BTD.dtype)


def experts(
    x_TD: jax.Array,
    experts_TK: jax.Array,
    gates_TK: jax.Array,
    weights: Weights,
    *,
    complete: bool = True,
) -> jax.Array:
    """sum_k gate_k E_k(x) [T, D] with all experts at hand. If not `complete`, the id beyond the
    last expert stands for none.
    """
    num_experts = weights.gate.shape[0]
    rows = block_rows(experts_TK.size, num_experts)
    copies, expert_x = lay_out(experts_TK, num_experts, rows, complete=complete)
    x_XD = dispatch(x_TD, copies)
    gate_up_X_FF = grouped_linear(x_XD, expert_x, weights.gate, weights.up)
    gate_X1 = gates_of_copies(gates_TK, copies)[:, None]
    y_XD = grouped_linear(gate_up_X_FF, expert_x, weights.down, activation=swiglu, gate_X1=gate_X1)
    return combine(y_XD, copies)


def block_rows(copies: int, num_experts: int) -> int:
    """Rows of a block: an expert's average share as a power of two, from 1 to 128."""
    return min(BLOCK, 1 << max(copies // num_experts, 1).bit_length() - 1)


def num_blocks(copies: int, num_experts: int, rows: int) -> int:
    """Blocks that suffice for every routing: each expert in use wastes at most rows - 1."""
    return (copies + min(num_experts, copies) * (rows - 1)) // rows


def lay_out(experts_TK: jax.Array, num_experts: int, rows: int, *, complete: bool = True) -> Layout:
    """Copies in order of expert, then of token. experts int32 [T, K]; where they are not
    `complete`, `num_experts` stands for a copy that is none.
    """
    copies = experts_TK.size
    onehot_JE = experts_TK.reshape(-1, 1) == jnp.arange(num_experts, dtype=jnp.int32)[None]
    rank_JE = running_count(onehot_JE) - 1
    blocks_E = -(-(rank_JE[-1] + 1) // rows)
    end_E = jnp.cumsum(blocks_E)
    slot_JE = rank_JE + (end_E - blocks_E)[None] * rows
    slot_J = jnp.where(onehot_JE, slot_JE, 0).sum(-1, dtype=jnp.int32)
    blocks = num_blocks(copies, num_experts, rows)
    slot_TK = slot_J.reshape(experts_TK.shape)
    if not complete:
        slot_TK = jnp.where(experts_TK < num_experts, slot_TK, blocks * rows)
    # Blocks beyond the last one in use belong to the last expert; their rows are empty.
    block_x = jnp.arange(blocks, dtype=jnp.int32)
    expert_x = (block_x[:, None] >= end_E[None, :-1]).sum(-1, dtype=jnp.int32)
    layout = Layout(in_slots(slot_TK, blocks * rows, complete=complete), expert_x)
    return checkpoint_name(layout, "moe_layout")


@jax.custom_vjp
def dispatch(x_TD: jax.Array, copies: Copies) -> jax.Array:
    """Rows of the blocks: each copy's token, zeros in empty slots. x [T, D] -> [X, D]."""
    return fill_slots(x_TD, copies)


@jax.custom_vjp
def combine(y_XD: jax.Array, copies: Copies) -> jax.Array:
    """Sum of each token's copies, at least float32 inside: dispatch transposed. -> [T, D]."""
    return _combined(y_XD, copies)


def _combined(y_XD: jax.Array, copies: Copies) -> jax.Array:
    return sum_copies(y_XD, copies).astype(y_XD.dtype)


@jax.custom_vjp
def gates_of_copies(gates_TK: jax.Array, copies: Copies) -> jax.Array:
    """The gate of every slot's copy [X], 0 in empty slots."""
    return fill_values(gates_TK, copies)


dispatch.defvjp(
    lambda x_TD, copies: (fill_slots(x_TD, copies), copies),
    lambda copies, dx_XD: (_combined(dx_XD, copies), None),
)
combine.defvjp(
    lambda y_XD, copies: (_combined(y_XD, copies), copies),
    lambda copies, dy_TD: (fill_slots(dy_TD, copies), None),
)
gates_of_copies.defvjp(
    lambda gates_TK, copies: (fill_values(gates_TK, copies), copies),
    lambda copies, dgate_X: (values_of_copies(dgate_X, copies), None),
)
