"""The dropless exchange of tokens and experts over two hops (report 3.2.2, 3.3.3).

Hop 1, over `node`: a token goes at most once to each node that has experts of its choice, to the
device with its own local index. Hop 2, over `local`: from there one copy for each expert. Results
come back the same way and are summed where they meet, in float32; between devices they are of the
activations' dtype. Payloads of the way there may be FP8 with powers of two as scales, forward and
for the gradient before the down-projection; on the wire they are bytes, since XLA:CPU would make
float16 of FP8.

Shapes are static, routing is not. A bucket holds so many rows for each target, and what does not
fit waits for the next round, until every copy is served: all devices of a group agree on the
number of rounds. Round 0 is plain differentiable code, whose residuals are kept; it is all there is
under balanced traffic. The others are a loop with a derivative rule that computes them again. So
nothing is dropped, and memory does not depend on the routing:

    hop 1    N rows = nodes * min(T, factor * T * nodes a token / nodes); none if there is one node
    hop 2    L rows = locals * factor * T * K / locals, at most what hop 1's rows can ask for
    experts  X rows: what blocks make of hop 2's, at most L + E / devices * (rows of a block - 1)

One layer, forward and backward, takes at most four times (N + L + X) rows of D numbers and 3 X rows
of F in the activations' dtype, and twice the weights' gradients in temporary memory.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.parallel.buckets import ExchangePlan, Queue, Tables, local_table, node_table, queue_of
from dsv3_jax.parallel.copies import Copies, fill_slots, fill_values, sum_copies, values_of_copies
from dsv3_jax.parallel.mesh import EXPERT_AXES, LOCAL, NODE, varying_like
from dsv3_jax.parallel.wire import Wire, pack, unpack
from dsv3_jax.quant.recipes import Operand
from dsv3_jax.quant.tape import hollow
from dsv3_jax.quant.trained_weight import TrainedWeight, off_tape
from dsv3_jax.quant.wide import wide

# What has come from other devices, by a name for policies of recomputation: to compute it again
# would be to send it again.
RECEIVED = "moe_received"

# (rows [R, D], their experts here [R, 1], `num_local` where none, gates [R, 1], weights) -> [R, D]
Apply = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


class Traffic(NamedTuple):
    """What one device's exchange did in one layer, int32."""

    received: jax.Array
    """Token copies that this device's experts computed"""
    rounds: jax.Array
    """Of its group of devices, all of which make the same number"""
    crossing_tokens: jax.Array
    """Tokens of which a copy left this node"""
    crossings: jax.Array
    """Pairs of a token and a node other than its own, to which it was sent: rows of hop 1"""
    local_copies: jax.Array
    """Copies of this device's tokens for another local index: rows of hop 2"""


def exchange(
    plan: ExchangePlan,
    wire: Wire,
    apply: Apply,
    x_TD: jax.Array,
    experts_TK: jax.Array,
    gates_TK: jax.Array,
    weights: Any,
) -> tuple[jax.Array, Traffic]:
    """sum_k gate_k E_k(x) of this device's tokens [T, D] in their dtype, and what that took.

    Within a `shard_map` over the mesh's axes. `experts_TK` int32 are ids among all experts;
    `weights` are those of this device's experts, `apply` what they do with rows that have come.
    """
    queue = queue_of(plan, experts_TK)
    zero = jnp.zeros_like(queue.rounds)
    y_TD, more = _one_round(plan, wire, apply, x_TD, gates_TK, weights, queue, (zero, zero))
    weights = jax.tree.map(off_tape, weights, is_leaf=_is_trained_weight)
    rest_TD, rounds = _rest(plan, wire, apply, x_TD, gates_TK, weights, queue, more)
    return (y_TD + rest_TD).astype(x_TD.dtype), _traffic(plan, queue, rounds)


def swapped(tree: Any, axis: str) -> Any:
    """Bucket g of every device of the axis goes to its device g; buckets come in that order."""
    size = lax.axis_size(axis)
    if size == 1:
        return tree

    def one(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x.reshape(size, -1, *x.shape[1:]), axis, 0, 0).reshape(x.shape)

    return jax.tree.map(one, tree)


# --- payloads there and back ---------------------------------------------------------------------


def _there(tree: Any, tables: Tables) -> Any:
    for axis, copies in ((NODE, tables.node), (LOCAL, tables.local)):
        if copies is not None:
            tree = swapped(jax.tree.map(partial(fill_slots, copies=copies), tree), axis)
    return tree


def _back(y_SD: jax.Array, tables: Tables) -> jax.Array:
    """Summed where copies meet; of the last sum [T, D] the wide dtype."""
    y = sum_copies(swapped(y_SD, LOCAL), tables.local)
    if tables.node is None:
        return y
    return sum_copies(swapped(y.astype(y_SD.dtype), NODE), tables.node)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(wire: Wire, x_TD: jax.Array, tables: Tables) -> jax.Array:
    """Rows [S, D] of hop 2's slots, zeros in empty ones."""
    return _dispatched(x_TD, wire.there, tables)


def _dispatched(x_TD: jax.Array, operand: Operand | None, tables: Tables) -> jax.Array:
    received = checkpoint_name(_there(pack(x_TD, operand), tables), RECEIVED)
    return unpack(received, operand, x_TD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(wire: Wire, y_SD: jax.Array, tables: Tables) -> jax.Array:
    """Each token's copies summed [T, D]: `_dispatch` transposed."""
    return _back(y_SD, tables)


def _dispatch_bwd(wire, tables, dx_SD):
    return _back(dx_SD, tables).astype(dx_SD.dtype), None


def _combine_bwd(wire, residuals, dy_TD):
    tables, like = residuals
    return _dispatched(dy_TD.astype(like.dtype), wire.back, tables), None


_dispatch.defvjp(lambda wire, x_TD, t: (_dispatched(x_TD, wire.there, t), t), _dispatch_bwd)
_combine.defvjp(
    lambda wire, y_SD, t: (_back(y_SD, t), (t, jnp.zeros((), y_SD.dtype))), _combine_bwd
)


@jax.custom_vjp
def _dispatch_gates(gates_TK: jax.Array, tables: Tables) -> jax.Array:
    """The gate of each slot's copy [S], 0 in empty ones."""
    return _values_there(gates_TK, tables)


def _values_there(v_TK: jax.Array, tables: Tables) -> jax.Array:
    v_S = swapped(fill_values(_rows_there(v_TK, tables.node), tables.local), LOCAL)
    return checkpoint_name(v_S, RECEIVED)


def _rows_there(v_TK: jax.Array, by_node: Copies | None) -> jax.Array:
    """Hop 1 alone."""
    return v_TK if by_node is None else swapped(fill_slots(v_TK, by_node), NODE)


def _dispatch_gates_bwd(tables, dgate_S):
    dgates_RK = values_of_copies(swapped(dgate_S, LOCAL), tables.local)
    if tables.node is None:
        return dgates_RK, None
    # Of the experts of other nodes a row brings zeros.
    return sum_copies(swapped(dgates_RK, NODE), tables.node), None


_dispatch_gates.defvjp(lambda g, tables: (_values_there(g, tables), tables), _dispatch_gates_bwd)


# --- rounds --------------------------------------------------------------------------------------


def _one_round(plan, wire, apply, x_TD, gates_TK, weights, queue, turns):
    """What the copies of one round add to the results [T, D], wide; and how many turns hop 2 takes
    for those rows.
    """
    node_turn, local_turn = turns
    by_node = node_table(plan, queue, node_turn)
    # 0 stands for no expert, as in empty slots.
    experts_RK = _rows_there(queue.experts_TK + 1, by_node) - 1
    by_local, here_RK, more = local_table(plan, experts_RK, len(x_TD), local_turn)
    expert_S = swapped(fill_values(here_RK + 1, by_local), LOCAL) - 1
    expert_S = jnp.where(expert_S < 0, plan.num_local, expert_S)
    tables = Tables(by_node, by_local)
    tables, expert_S, more = checkpoint_name((tables, expert_S, more), RECEIVED)
    x_SD = _dispatch(wire, x_TD, tables)
    gate_S = _dispatch_gates(gates_TK, tables)
    y_SD = apply(x_SD, expert_S[:, None], gate_S[:, None], weights)
    return _combine(wire, y_SD, tables), more


def _next(turns, more):
    node_turn, local_turn = turns
    goes_on = local_turn + 1 < more
    return jnp.where(goes_on, node_turn, node_turn + 1), jnp.where(goes_on, local_turn + 1, 0)


def _loop(queue, more, zeros, step):
    """Sums `step(turns) -> (tree, more)` over all rounds but the first, and counts rounds."""

    def body(carry):
        turns, count, total = carry
        found, more = step(turns)
        return _next(turns, more), count + 1, jax.tree.map(jnp.add, total, found)

    zero = jnp.zeros_like(queue.rounds)
    start = _next((zero, zero), more), zero + 1
    _, count, total = lax.while_loop(
        lambda carry: carry[0][0] < queue.rounds, body, (*start, zeros)
    )
    return total, count


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rest(plan, wire, apply, x_TD, gates_TK, weights, queue, more):
    """What all rounds but the first add [T, D], and the number of rounds with it."""
    zeros = jnp.zeros_like(x_TD, wide(x_TD.dtype))

    def step(turns):
        return _one_round(plan, wire, apply, x_TD, gates_TK, weights, queue, turns)

    return _loop(queue, more, zeros, step)


def _rest_fwd(plan, wire, apply, x_TD, gates_TK, weights, *others):
    result = _rest(plan, wire, apply, x_TD, gates_TK, weights, *others)
    weights = jax.tree.map(_without_slot, weights, is_leaf=_is_trained_weight)
    return result, (x_TD, gates_TK, weights, *others)


def _rest_bwd(plan, wire, apply, residuals, cotangents):
    x_TD, gates_TK, weights, queue, more = residuals
    trained = jax.tree.map(_destination, weights, is_leaf=_is_trained_weight)

    def results(x_TD, gates_TK, trained, turns):
        used = _with_destinations(trained, weights)
        return _one_round(plan, wire, apply, x_TD, gates_TK, used, queue, turns)

    def step(turns):
        call = partial(results, turns=turns)
        _, pull, more = jax.vjp(call, x_TD, gates_TK, trained, has_aux=True)
        dx_TD, *others = pull(cotangents[0])
        return (dx_TD.astype(wide(dx_TD.dtype)), *others), more

    zeros = jax.tree.map(jnp.zeros_like, (gates_TK, trained))
    zeros = jnp.zeros_like(x_TD, wide(x_TD.dtype)), *zeros
    (dx_TD, dgates_TK, dtrained), _ = _loop(queue, more, zeros, step)
    dweights = _with_destinations(dtrained, weights, gradients=True)
    return dx_TD.astype(x_TD.dtype), dgates_TK, dweights, None, None


_rest.defvjp(_rest_fwd, _rest_bwd)


def _is_trained_weight(node: Any) -> bool:
    return isinstance(node, TrainedWeight)


def _without_slot(weight: jax.Array | TrainedWeight) -> jax.Array | TrainedWeight:
    """What a backward pass needs of it: the slot is never read, and may be of the weight's size."""
    if not _is_trained_weight(weight):
        return weight
    return replace(weight, slot=hollow((weight.slot,))[0], taps=None)


def _destination(weight: jax.Array | TrainedWeight) -> jax.Array:
    """Where its gradient goes; of a weight without its slot."""
    if not _is_trained_weight(weight):
        return weight
    return varying_like(jnp.zeros(weight.shape, weight.dtype), weight.value)


def _with_destinations(there: Any, weights: Any, *, gradients: bool = False) -> Any:
    """Weights whose gradients go there; or, of gradients, those of the weights."""

    def one(weight: jax.Array | TrainedWeight, slot: jax.Array) -> Any:
        if not _is_trained_weight(weight):
            return slot
        if gradients:  # None: no gradient at all
            return replace(weight, value=None, slot=slot)
        return replace(weight, slot=slot)

    return jax.tree.map(one, weights, there, is_leaf=_is_trained_weight)


def _traffic(plan: ExchangePlan, queue: Queue, rounds: jax.Array) -> Traffic:
    """Counted from the routing, not from the rounds."""
    experts_TK = queue.experts_TK
    device_TK = experts_TK // plan.num_local
    devices = jnp.arange(plan.nodes * plan.locals, dtype=jnp.int32)
    copies_P = (device_TK[:, :, None] == devices[None, None]).sum((0, 1), dtype=jnp.int32)
    elsewhere_N = jnp.arange(plan.nodes, dtype=jnp.int32) != lax.axis_index(NODE)
    crosses_TN = queue.goes_TN & elsewhere_N[None]
    crossing_tokens = crosses_TN.any(-1).sum(dtype=jnp.int32)
    crossings = crosses_TN.sum(dtype=jnp.int32)
    other = (device_TK % plan.locals != lax.axis_index(LOCAL)).sum(dtype=jnp.int32)
    received = lax.psum_scatter(copies_P, EXPERT_AXES, tiled=True)[0]
    return Traffic(received, rounds, crossing_tokens, crossings, other)
