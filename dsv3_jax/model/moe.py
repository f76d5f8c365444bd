"""DeepSeekMoE on one device: shared and routed experts, no token dropped (report 2.1.2, Eq. 12-14).

Token copies are laid out per expert in blocks of equally many rows; each expert's last block may
be part empty. The number of blocks has a static bound that holds for every routing, so nothing is
dropped and nothing grows. The experts are then batched GEMMs over blocks. Dispatch and combine
are each other's transposes and gathers both: a scatter would run on one core of XLA:CPU and be
atomic on a GPU. A copy's gate acts on its expert's hidden state, before the down-projection: the
same sum, and neither the outputs of the experts are kept for the gates' gradient, nor need they
stay apart on their way back.
`dense_experts` is the obvious form that the blocks must equal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import FeedForward, Init, swiglu
from dsv3_jax.model.router import Router, RouterStats, Routing
from dsv3_jax.quant.gemm import grouped_linear, linear, wide

# Rows of a full block: the M of a tensor-core tile, and the K of the FP8 weight gradient.
BLOCK = 128


class Layout(NamedTuple):
    """Token copies in blocks.

    int32: slot of every copy; copy of every slot (T * K where empty); expert of every block.
    """

    slot_TK: jax.Array
    copy_X: jax.Array
    expert_x: jax.Array


class MoE(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, init: Init) -> None:
        e, d, f = cfg.num_experts, cfg.d_model, cfg.expert_hidden
        self.router = Router(cfg, init=init.at("router"))
        self.w_gate_EDF = init.normal("w_gate_EDF", e, d, f)
        self.w_up_EDF = init.normal("w_up_EDF", e, d, f)
        self.w_down_EFD = init.normal("w_down_EFD", e, f, d)
        hidden = cfg.num_shared_experts * f
        self.shared = FeedForward(d, hidden, init=init.at("shared")) if hidden else None

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """Shared plus gated routed experts; statistics over valid tokens (bool [B, T])."""
        routing, stats = self.router(x_BTD, valid_BT)
        y_BTD = self.routed(x_BTD, routing)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)), stats

    def routed(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """sum_k gate_k E_k(x) over each token's experts."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        experts_TK = routing.experts_BTK.reshape(len(x_TD), -1)
        gates_TK = routing.gates_BTK.reshape(experts_TK.shape)
        num_experts = self.w_gate_EDF.shape[0]
        layout = lay_out(experts_TK, num_experts, block_rows(experts_TK.size, num_experts))
        x_XD = dispatch(x_TD, layout)
        weights = self.w_gate_EDF[...], self.w_up_EDF[...]
        gate_up_X_FF = grouped_linear(x_XD, layout.expert_x, *weights)
        y_XD = grouped_linear(
            gate_up_X_FF,
            layout.expert_x,
            self.w_down_EFD[...],
            activation=swiglu,
            gate_X1=gates_of_copies(gates_TK, layout)[:, None],
        )
        return combine(y_XD, layout).reshape(x_BTD.shape)

    def dense_experts(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """`routed` the slow way: every expert computes every token."""
        y_BTD = jnp.zeros(x_BTD.shape, wide(x_BTD.dtype))
        for e in range(self.w_gate_EDF.shape[0]):
            gate_up_BT_FF = linear(x_BTD, self.w_gate_EDF[e], self.w_up_EDF[e])
            y_e_BTD = linear(gate_up_BT_FF, self.w_down_EFD[e], activation=swiglu)
            gate_BT = jnp.where(routing.experts_BTK == e, routing.gates_BTK, 0).sum(-1)
            y_BTD += y_e_BTD * gate_BT[..., None]
        return y_BTD.astype(x_BTD.dtype)


def block_rows(copies: int, num_experts: int) -> int:
    """Rows of a block: an expert's average share as a power of two, from 1 to 128."""
    return min(BLOCK, 1 << max(copies // num_experts, 1).bit_length() - 1)


def num_blocks(copies: int, num_experts: int, rows: int) -> int:
    """Blocks that suffice for every routing: each expert in use wastes at most rows - 1."""
    return (copies + min(num_experts, copies) * (rows - 1)) // rows


def lay_out(experts_TK: jax.Array, num_experts: int, rows: int) -> Layout:
    """Copies in order of expert, then of token. experts int32 [T, K]."""
    copies = experts_TK.size
    onehot_JE = experts_TK.reshape(-1, 1) == jnp.arange(num_experts, dtype=jnp.int32)[None]
    rank_JE = _running_count(onehot_JE) - 1
    blocks_E = -(-(rank_JE[-1] + 1) // rows)
    end_E = jnp.cumsum(blocks_E)
    slot_JE = rank_JE + (end_E - blocks_E)[None] * rows
    slot_J = jnp.where(onehot_JE, slot_JE, 0).sum(-1, dtype=jnp.int32)
    blocks = num_blocks(copies, num_experts, rows)
    copy_X = jnp.full(blocks * rows, copies, jnp.int32)
    copy_X = copy_X.at[slot_J].set(jnp.arange(copies, dtype=jnp.int32), unique_indices=True)
    # Blocks beyond the last one in use belong to the last expert; their rows are empty.
    block_x = jnp.arange(blocks, dtype=jnp.int32)
    expert_x = (block_x[:, None] >= end_E[None, :-1]).sum(-1, dtype=jnp.int32)
    layout = Layout(slot_J.reshape(experts_TK.shape), copy_X, expert_x)
    return checkpoint_name(layout, "moe_layout")


def _running_count(onehot_JE: jax.Array, chunk: int = 128) -> jax.Array:
    """Inclusive running sums of the columns, int32.

    Two levels of triangular products: a cumsum over J is serial on XLA:CPU.
    """
    size, num_experts = onehot_JE.shape
    padded = jnp.pad(onehot_JE, ((0, -size % chunk), (0, 0))).reshape(-1, chunk, num_experts)
    # Counts within a chunk are at most 128: exact in float32.
    ones = padded.astype(jnp.float32)
    within = jnp.einsum("ij,cje->cie", jnp.tri(chunk, dtype=jnp.float32), ones).astype(jnp.int32)
    total = within[:, -1]
    before = jnp.cumsum(total, 0) - total
    return (within + before[:, None]).reshape(-1, num_experts)[:size]


def _rows_of_copies(x_TD: jax.Array, layout: Layout) -> jax.Array:
    token_X = layout.copy_X // layout.slot_TK.shape[1]
    return x_TD.at[token_X].get(mode="fill", fill_value=0)


def _sum_of_copies(y_XD: jax.Array, layout: Layout) -> jax.Array:
    high, slots = wide(y_XD.dtype), layout.slot_TK.T
    return sum(y_XD[slot_T].astype(high) for slot_T in slots).astype(y_XD.dtype)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: Layout) -> jax.Array:
    """Rows of the blocks: each copy's token, zeros in empty slots. x [T, D] -> [X, D]."""
    return _rows_of_copies(x_TD, layout)


@jax.custom_vjp
def combine(y_XD: jax.Array, layout: Layout) -> jax.Array:
    """Sum of each token's copies, at least float32 inside: dispatch transposed. -> [T, D]."""
    return _sum_of_copies(y_XD, layout)


@jax.custom_vjp
def gates_of_copies(gates_TK: jax.Array, layout: Layout) -> jax.Array:
    """The gate of every slot's copy [X], 0 in empty slots."""
    return gates_TK.reshape(-1).at[layout.copy_X].get(mode="fill", fill_value=0)


dispatch.defvjp(
    lambda x_TD, layout: (_rows_of_copies(x_TD, layout), layout),
    lambda layout, dx_XD: (_sum_of_copies(dx_XD, layout), None),
)
combine.defvjp(
    lambda y_XD, layout: (_sum_of_copies(y_XD, layout), layout),
    lambda layout, dy_TD: (_rows_of_copies(dy_TD, layout), None),
)
gates_of_copies.defvjp(
    lambda gates_TK, layout: (gates_of_copies(gates_TK, layout), layout),
    lambda layout, dgate_X: (dgate_X[layout.slot_TK], None),
)
