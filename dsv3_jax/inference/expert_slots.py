"""Weights of experts in physical slots: made of a model's, and moved when loads have changed.

Every ten minutes or so (report 3.4.1) a serving unit learns from its loads where copies of experts
should be, and weights move between devices. They do so in rounds: each device shows all others one
of its slots, and who needs that keeps it. So beyond a layer's old weights and its new ones it takes
the room of one expert from each device (and of the new ones once more on XLA:CPU, which copies what
a loop has made to see it as FP8). A slot that no other device needs is not shown; one that stays on
its device is copied there. What goes where, and in how many rounds, is an argument of the program:
one moves all layers of a shape.

Letters: Q old slots, P new ones, I those of one device; W devices that share the experts.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.layers import FeedForward
from dsv3_jax.model.moe import MoE, Weights
from dsv3_jax.parallel.mesh import EXPERT_AXES
from dsv3_jax.quant.bits import as_bits
from dsv3_jax.quant.fp8 import Blocked

SLOTS = P(EXPERT_AXES)


def slots_of(
    moe: MoE,
    physical_to_logical_P: np.ndarray,
    mesh: Mesh | None = None,
    *,
    shared_as_routed: bool = False,
) -> MoE:
    """A layer whose experts' weights [P, ...] are those of physical slots; arrays or `Blocked`.

    With `shared_as_routed` the shared feed-forward comes apart into its experts, of logical ids
    from E on, and is gone itself. On a mesh slots are spread over node and local. Weights that lie
    on it already, as `load_pretrained` puts them, go from device to device; others are put there
    slot by slot, and what is no expert stays where it is. ValueError for shared experts of another
    dtype than the routed ones, or whose blocks of FP8 cannot be told apart.
    """
    weights, shared = weights_of(moe), None
    old_Q = np.arange(weights.gate.shape[0])
    if shared_as_routed and moe.shared is not None:
        shared = _apart(moe.shared, moe.router.cfg.num_shared_experts, weights)
    if mesh is None or not _lies_on(weights, mesh):
        if shared is not None:
            weights = _joined(weights, shared)
        weights = _placed(weights, np.asarray(physical_to_logical_P), mesh)
    else:
        if shared is not None:
            # Every device has its own: they are never shown.
            ids_S = len(old_Q) + np.arange(shared.gate.shape[0])
            weights = _joined_on(weights, shared, mesh)
            devices = _num_devices(mesh)
            own_DQ = old_Q.reshape(devices, -1)
            every_DS = np.broadcast_to(ids_S, (devices, len(ids_S)))
            old_Q = np.concatenate([own_DQ, every_DS], 1).reshape(-1)
        weights = moved(weights, old_Q, physical_to_logical_P, mesh)
    served = jax.tree.map(lambda x: x, moe)
    served.w_gate_EDF = moe.w_gate_EDF.replace(weights.gate)
    served.w_up_EDF = moe.w_up_EDF.replace(weights.up)
    served.w_down_EFD = moe.w_down_EFD.replace(weights.down)
    if shared is not None:
        served.shared = None
    return served


def weights_of(moe: MoE) -> Weights:
    return Weights(moe.w_gate_EDF[...], moe.w_up_EDF[...], moe.w_down_EFD[...])


def moved(
    weights: Any,
    old_physical_to_logical_Q: np.ndarray,
    new_physical_to_logical_P: np.ndarray,
    mesh: Mesh | None = None,
) -> Any:
    """The weights [P, ...] of new slots from those of old ones [Q, ...], any tree of arrays.

    On a mesh both are spread over node and local, and P and Q are multiples of its devices. The old
    ones stay as they are.
    """
    plan = moves(
        np.asarray(old_physical_to_logical_Q),
        np.asarray(new_physical_to_logical_P),
        1 if mesh is None else _num_devices(mesh),
    )
    return _taken(weights, plan.slot_P) if mesh is None else _moved(weights, plan, mesh)


class Moves(NamedTuple):
    """Where the experts of new slots come from, all int32."""

    device_P: np.ndarray
    """Its own, if that has the expert"""
    slot_P: np.ndarray
    """On that device"""
    turn_P: np.ndarray
    """The round in which it is shown; -1 if it stays on its device"""
    shown_WI: np.ndarray
    """The old slots of every device in the order in which it shows them"""
    rounds: np.ndarray
    """As many as the busiest device has to show"""


def moves(old_Q: np.ndarray, new_P: np.ndarray, devices: int) -> Moves:
    """From one table of physical to logical experts to another."""
    missing = sorted(set(new_P.tolist()) - set(old_Q.tolist()))
    assert not missing, f"experts {missing} are in no old slot"
    assert len(old_Q) % devices == len(new_P) % devices == 0, (len(old_Q), len(new_P), devices)
    per_device = len(old_Q) // devices
    holder_Q, own_P = (np.arange(len(x)) // (len(x) // devices) for x in (old_Q, new_P))
    same_PQ = new_P[:, None] == old_Q[None]
    own_PQ = own_P[:, None] == holder_Q[None]
    source_P = np.where(same_PQ, 1 + own_PQ, 0).argmax(1)
    device_P, slot_P = source_P // per_device, source_P % per_device
    travels_P = device_P != own_P
    needed_WI = np.zeros((devices, per_device), bool)
    needed_WI[device_P[travels_P], slot_P[travels_P]] = True
    shown_WI = np.argsort(~needed_WI, axis=1, kind="stable")
    turn_P = np.where(travels_P, np.argsort(shown_WI, axis=1)[device_P, slot_P], -1)
    rounds = needed_WI.sum(1).max()
    return Moves(*map(np.int32, (device_P, slot_P, turn_P, shown_WI, rounds)))


# --- on a mesh ------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="mesh")
def _moved(weights: Any, plan: Moves, mesh: Mesh) -> Any:
    rearranged = jax.shard_map(_rearranged, mesh=mesh, in_specs=(SLOTS, P()), out_specs=SLOTS)
    return rearranged(weights, plan)


def _rearranged(weights: Any, plan: Moves) -> Any:
    """Within a `shard_map`: this device's old slots as its new ones."""
    num_new = len(plan.slot_P) // len(plan.shown_WI)
    me = lax.axis_index(EXPERT_AXES)
    device_I, slot_I, turn_I = (
        lax.dynamic_slice_in_dim(x_P, me * num_new, num_new)
        for x_P in (plan.device_P, plan.slot_P, plan.turn_P)
    )
    bits = jax.tree.map(as_bits, weights)
    stays = jax.tree.map(lambda x: x[slot_I], bits)

    def one_round(turn: jax.Array, filled: Any) -> Any:
        at = plan.shown_WI[me, turn]
        shown = jax.tree.map(lambda x: lax.all_gather(x[at], EXPERT_AXES), bits)

        def keep(i: jax.Array, filled: Any) -> Any:
            comes = turn_I[i] == turn
            return jax.tree.map(
                lambda x, y: x.at[i].set(jnp.where(comes, y[device_I[i]], x[i])), filled, shown
            )

        return lax.fori_loop(0, num_new, keep, filled)

    filled = lax.fori_loop(0, plan.rounds, one_round, stays)
    return jax.tree.map(lambda x, w: lax.bitcast_convert_type(x, w.dtype), filled, weights)


@partial(jax.jit, static_argnames="mesh")
def _joined_on(weights: Weights, shared: Weights, mesh: Mesh) -> Weights:
    """Every device's slots, and all shared experts behind them."""
    return jax.shard_map(_joined, mesh=mesh, in_specs=(SLOTS, P()), out_specs=SLOTS)(
        weights, shared
    )


def _num_devices(mesh: Mesh) -> int:
    """That share the experts."""
    return mesh.shape[EXPERT_AXES[0]] * mesh.shape[EXPERT_AXES[1]]


def _lies_on(weights: Weights, mesh: Mesh) -> bool:
    shardings = (x.sharding for x in jax.tree.leaves(weights))
    return all(isinstance(s, NamedSharding) and s.mesh == mesh for s in shardings)


# --- from one device ------------------------------------------------------------------------------


def _placed(weights: Weights, source_P: np.ndarray, mesh: Mesh | None) -> Weights:
    """Rows `source_P` of weights on one device, spread over a mesh if there is one."""
    if mesh is None:
        return _taken(weights, source_P)
    sharding = NamedSharding(mesh, SLOTS)

    def one(x: jax.Array) -> jax.Array:
        shape = len(source_P), *x.shape[1:]
        return jax.make_array_from_callback(
            shape, sharding, lambda index: _taken(x, source_P[index[0]])
        )

    return jax.tree.map(one, weights)


@jax.jit
def _taken(weights: Any, source_P: jax.Array) -> Any:
    def one(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(as_bits(x)[source_P], x.dtype)

    return jax.tree.map(one, weights)


@jax.jit
def _joined(weights: Weights, shared: Weights) -> Weights:
    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(jnp.concatenate([as_bits(x), as_bits(y)]), x.dtype)

    return jax.tree.map(one, weights, shared)


def _apart(shared: FeedForward, number: int, routed: Weights) -> Weights:
    """A feed-forward of `number` x F columns as so many experts."""
    gate, up, down = (w[...] for w in (shared.w_gate_DF, shared.w_up_DF, shared.w_down_FD))
    hidden = down.shape[0] // number
    for w, like in zip((gate, up, down), routed, strict=True):
        kinds = [f"{type(x).__name__} of {x.dtype}" for x in (w, like)]
        if (type(w), w.dtype) != (type(like), like.dtype):
            raise ValueError(
                f"shared experts are {kinds[0]}, routed ones {kinds[1]}; allowed: both alike, "
                "if they are to be served as routed ones"
            )
        if isinstance(w, Blocked) and number > 1 and hidden % w.block[0]:
            raise ValueError(
                f"{number} shared experts of {hidden} columns in blocks of {w.block[0]}; allowed: "
                "multiples of it, or one expert, to be served as routed ones"
            )

    return _cut(Weights(gate, up, down), number)


@partial(jax.jit, static_argnames="number")
def _cut(whole: Weights, number: int) -> Weights:
    def columns(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], number, -1).swapaxes(0, 1)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(number, -1, x.shape[1])

    gate, up = (jax.tree.map(columns, w) for w in (whole.gate, whole.up))
    return Weights(gate, up, jax.tree.map(rows, whole.down))
