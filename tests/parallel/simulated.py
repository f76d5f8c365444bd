"""The exchange of all devices in one process, with lists: which row lies in which slot of which
device in which round, and what experts then compute. An oracle with the same blocks of rows.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.moe import Weights, experts
from dsv3_jax.parallel.buckets import ExchangePlan
from dsv3_jax.parallel.wire import Wire
from dsv3_jax.quant.recipes import Operand

Copy = tuple[int, int]  # a token of all, and which of its choices
Slots = list[list[Copy | None]]  # of every device


def rounds(plan: ExchangePlan, experts_TK: np.ndarray) -> Iterator[Slots]:
    """Of one group of devices, whose tokens come one device after the other; round by round."""
    devices = plan.nodes * plan.locals
    tokens, k = len(experts_TK) // devices, experts_TK.shape[1]
    node_rows, local_rows = plan.node_rows(tokens), plan.local_rows(tokens, k)
    node_of = experts_TK // (plan.num_experts // plan.nodes)
    device_of = experts_TK // plan.num_local
    # Hop 1: what waits at each device for each node.
    waiting = {
        (device, node): [
            t
            for t in range(device * tokens, (device + 1) * tokens)
            if (node_of[t] == node).any() or plan.nodes == 1
        ]
        for device in range(devices)
        for node in range(plan.nodes)
    }
    while any(waiting.values()):
        arrived = {device: [] for device in range(devices)}
        for device in range(devices):
            node, local = divmod(device, plan.locals)
            for source in range(plan.nodes):
                queue = waiting[source * plan.locals + local, node]
                arrived[device] += queue[:node_rows]
                del queue[:node_rows]
        # Hop 2: from each of them, what waits for each device of its node.
        copies = {
            (device, target): [
                (t, j)
                for t in rows
                for j in range(k)
                if device_of[t, j] == device // plan.locals * plan.locals + target
            ]
            for device, rows in arrived.items()
            for target in range(plan.locals)
        }
        first = True
        while first or any(copies.values()):
            first = False
            slots: Slots = [[] for _ in range(devices)]
            for device in range(devices):
                node, local = divmod(device, plan.locals)
                for source in range(plan.locals):
                    queue = copies[node * plan.locals + source, local]
                    now = queue[:local_rows]
                    del queue[:local_rows]
                    slots[device] += now + [None] * (local_rows - len(now))
            yield slots


def simulated(plan: ExchangePlan, wire: Wire, shards: int) -> Callable:
    """`f(x_TD, gates_TK, weights, experts_TK)` of the tokens of all groups (`shards` devices)."""

    def layer(x_TD, gates_TK, weights: Weights, experts_TK: np.ndarray):
        group = len(x_TD) // (shards // (plan.nodes * plan.locals))
        parts = []
        for start in range(0, len(x_TD), group):
            part = slice(start, start + group)
            parts.append(_group(plan, wire, x_TD[part], gates_TK[part], weights, experts_TK[part]))
        return jnp.concatenate(parts)

    return layer


def _group(plan, wire, x_TD, gates_TK, weights, experts_TK):
    x_TD = _rounded_there(wire.there, x_TD)
    y_TD = jnp.zeros(x_TD.shape)
    for slots in rounds(plan, experts_TK):
        for device, copies in enumerate(slots):
            here = slice(device * plan.num_local, (device + 1) * plan.num_local)
            own = jax.tree.map(lambda w, here=here: w[here], weights)
            token_S = np.array([copy[0] if copy else 0 for copy in copies])
            choice_S = np.array([copy[1] if copy else 0 for copy in copies])
            live_S = np.array([copy is not None for copy in copies])
            expert_S = experts_TK[token_S, choice_S] % plan.num_local
            expert_S = np.where(live_S, expert_S, plan.num_local).astype(np.int32)
            x_SD = jnp.where(live_S[:, None], x_TD[token_S], 0)
            gate_S = jnp.where(live_S, gates_TK[token_S, choice_S], 0)
            apply = partial(experts, complete=False)
            y_SD = apply(x_SD, jnp.asarray(expert_S)[:, None], gate_S[:, None], own)
            y_TD = y_TD.at[token_S].add(jnp.where(live_S[:, None], y_SD, 0))
    return _rounded_back(wire.back, y_TD)


def _fake(operand: Operand | None, x_TD: jax.Array) -> jax.Array:
    return x_TD if operand is None else operand.fake_quantize(x_TD[None])[0].astype(x_TD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_there(operand, x_TD):
    return _fake(operand, x_TD)


_rounded_there.defvjp(
    lambda operand, x_TD: (_fake(operand, x_TD), None), lambda operand, _, dx_TD: (dx_TD,)
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_back(operand, y_TD):
    return y_TD


_rounded_back.defvjp(
    lambda operand, y_TD: (y_TD, None), lambda operand, _, dy_TD: (_fake(operand, dy_TD),)
)
