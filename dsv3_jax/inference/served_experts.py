"""Experts as an engine serves them: padding goes nowhere, busy experts have copies (report 3.4).

A batch that is served has rows without a token. They go to no expert, so that whatever they hold
takes no room in a bucket and reaches nobody. A layer's weights may lie in physical slots, several
of which hold copies of one expert (`expert_slots`): a `Placement` says which, and an expert's
tokens take its copies in turn. The shared expert may be one of the routed ones, with gate 1 for
every token: 9 experts a token in V3's decoding, where it has devices and copies like any other.

E here counts logical experts, with the shared ones if they are routed; P physical slots; C the most
copies that an expert may have, a static size: another placement is no other program.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.inference.expert_slots import weights_of
from dsv3_jax.model.moe import MoE, experts
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.dispatch import exchange
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.parallel.wire import PLAIN


class Placement(NamedTuple):
    """One layer's copies: int32 [E, C] their physical slots, -1 where there is none, and int32 [E]
    how many there are. The same on every device.
    """

    physical_EC: jax.Array
    count_E: jax.Array


def make_serving_plan(
    mesh: MeshConfig,
    model: ModelConfig,
    num_slots: int,
    *,
    shared_as_routed: bool = False,
    grouped: bool = False,
) -> ExchangePlan | None:
    """The exchange of `num_slots` physical experts; None where one device holds all.

    With `grouped` all copies of an expert lie on its group's node, as hierarchical placement has
    them: then a token goes to no more nodes than it keeps groups. Else each of its experts may lie
    on another node. ValueError for slots that the devices cannot share evenly.
    """
    if num_slots % mesh.expert_shards:
        raise ValueError(
            f"physical experts are {num_slots}; allowed: multiples of the {mesh.expert_shards} "
            "devices of mesh.node x mesh.local"
        )
    if mesh.expert_shards == 1:
        return None
    shared = model.num_shared_experts * shared_as_routed
    routed_nodes = mesh.nodes_per_token(model) if grouped else model.experts_per_token
    nodes = min(mesh.node, routed_nodes + shared)
    return ExchangePlan(num_slots, mesh.node, mesh.local, nodes, mesh.bucket_factor)


def served_experts(
    moe: MoE,
    x_BTD: jax.Array,
    valid_BT: jax.Array,
    plan: ExchangePlan | None = None,
    placement: Placement | None = None,
    shared_as_routed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Shared plus gated routed experts of valid tokens (bool [B, T]), and their load int32 [E].

    `moe` holds the weights of physical slots, those of this device: `expert_slots.slots_of` makes
    it. Without a placement expert e is in slot e. With a `plan`, made for all slots, they are
    spread over devices, within a `shard_map` over the axes of `parallel.mesh`.

    The load counts this device's valid tokens, by logical expert; copies have no part in it. Rows
    that are not valid get the sum of no routed experts, 0, and what the shared expert, if it is not
    routed, makes of them: it may be NaN if they are.
    """
    routing, stats = moe.router(x_BTD, valid_BT)
    x_TD, valid_T = x_BTD.reshape(-1, x_BTD.shape[-1]), valid_BT.reshape(-1)
    experts_TK = routing.experts_BTK.reshape(len(x_TD), -1)
    gates_TK = routing.gates_BTK.reshape(experts_TK.shape)
    load_E = stats.load_E
    if shared_as_routed:
        shared = moe.router.cfg.num_shared_experts
        ids_S = len(load_E) + jnp.arange(shared, dtype=jnp.int32)
        ids_TS = jnp.broadcast_to(ids_S[None], (len(x_TD), shared))
        experts_TK = jnp.concatenate([experts_TK, ids_TS], 1)
        gates_TK = jnp.concatenate([gates_TK, jnp.ones(ids_TS.shape, gates_TK.dtype)], 1)
        every_S = jnp.broadcast_to(valid_T.sum(dtype=jnp.int32), shared)
        load_E = jnp.concatenate([load_E, every_S])
    if placement is not None:
        device = 0 if plan is None else lax.axis_index(TOKEN_AXES)
        experts_TK = physical(experts_TK, valid_T, placement, device)
    weights, apply = weights_of(moe), partial(experts, complete=False)
    nobody = weights.gate.shape[0] if plan is None else plan.num_experts
    experts_TK = jnp.where(valid_T[:, None], experts_TK, nobody)
    if plan is None:
        y_TD = apply(x_TD, experts_TK, gates_TK, weights)
    else:
        y_TD, _ = exchange(plan, PLAIN, apply, x_TD, experts_TK, gates_TK, weights)
    y_BTD = y_TD.reshape(x_BTD.shape)
    if moe.shared is not None and not shared_as_routed:
        y_BTD += moe.shared(x_BTD)
    return y_BTD, load_E


def physical(
    experts_TK: jax.Array, valid_T: jax.Array, placement: Placement, device: int | jax.Array
) -> jax.Array:
    """Slots [T, K] of the experts that tokens chose.

    The n-th valid token of device d takes copy n + d of each of its experts, modulo their number.
    Only valid tokens are counted: where every other row is padding, all would else take one copy.
    """
    turn_T = jnp.cumsum(valid_T, dtype=jnp.int32) - 1 + device
    copy_TK = turn_T[:, None] % placement.count_E[experts_TK]
    return placement.physical_EC[experts_TK, copy_TK]
