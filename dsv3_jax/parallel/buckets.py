"""Which copy of a token goes to which device in which round: the tables of the exchange.

Rows wait in a queue for each target; a bucket takes so many of them in a round.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.parallel.copies import Copies, in_slots, running_count
from dsv3_jax.parallel.mesh import EXPERT_AXES, NODE
from dsv3_jax.parallel.sequence import RowShards, make_row_shards


@dataclass(frozen=True)
class ExchangePlan:
    """How experts lie on the devices that share them, expert e on device e // num_local, nodes
    first; how much room a round has; and whether these devices share rows as well.
    """

    num_experts: int
    nodes: int
    locals: int
    nodes_per_token: int
    """At most, whatever is chosen"""
    factor: float
    """Rows of a bucket over its share under balanced routing"""
    rows: RowShards | None = None
    """Devices that share a row of tokens, if rows are split; they share experts too"""

    @property
    def num_local(self) -> int:
        """Experts on one device."""
        return self.num_experts // (self.nodes * self.locals)

    def node_rows(self, tokens: int) -> int:
        """Rows of hop 1 for one node, in one round, of a device with so many tokens."""
        share = tokens * self.nodes_per_token / self.nodes
        return min(tokens, math.ceil(self.factor * share))

    def local_rows(self, tokens: int, experts_per_token: int) -> int:
        """Rows of hop 2 for one device, in one round."""
        arrived = tokens if self.nodes == 1 else self.nodes * self.node_rows(tokens)
        share = tokens * experts_per_token / self.locals
        return min(arrived * min(experts_per_token, self.num_local), math.ceil(self.factor * share))


def make_exchange_plan(mesh: MeshConfig, model: ModelConfig) -> ExchangePlan | None:
    """Of a run; None where every device holds all experts."""
    if mesh.expert_shards == 1:
        return None
    nodes, rows = mesh.nodes_per_token(model), make_row_shards(mesh)
    return ExchangePlan(model.num_experts, mesh.node, mesh.local, nodes, mesh.bucket_factor, rows)


class Queue(NamedTuple):
    """Hop 1: of every token and node, whether the token goes there, and its place in the queue."""

    goes_TN: jax.Array
    place_TN: jax.Array
    rounds: jax.Array
    experts_TK: jax.Array


class Tables(NamedTuple):
    """Of one round; None for a hop that is none."""

    node: Copies | None
    local: Copies


def queue_of(plan: ExchangePlan, experts_TK: jax.Array) -> Queue:
    """Of this device's tokens, with the group's number of rounds."""
    nodes = jnp.arange(plan.nodes, dtype=jnp.int32)
    node_TK = experts_TK // (plan.num_experts // plan.nodes)
    goes_TN = (node_TK[:, :, None] == nodes[None, None]).any(1)
    count_TN = running_count(goes_TN)
    if plan.nodes == 1:
        rounds = jnp.ones_like(count_TN[-1, 0])
    else:
        rounds = _rounds(count_TN[-1], plan.node_rows(len(experts_TK)))
    return Queue(goes_TN, count_TN - 1, rounds, experts_TK)


def _rounds(waiting_G: jax.Array, rows: int) -> jax.Array:
    """That the fullest bucket of any device of the group needs."""
    return lax.pmax(-(-waiting_G.max() // rows), EXPERT_AXES)


def _buckets(
    goes_RJ: jax.Array,
    target_RJ: jax.Array,
    place_RJ: jax.Array,
    rows: int,
    targets: int,
    turn: jax.Array,
) -> Copies:
    """Slots of the copies whose turn it is: `rows` for each target."""
    place_RJ = place_RJ - turn * rows
    fits_RJ = goes_RJ & (place_RJ >= 0) & (place_RJ < rows)
    slot_RJ = jnp.where(fits_RJ, target_RJ * rows + place_RJ, targets * rows)
    return in_slots(slot_RJ, targets * rows)


def node_table(plan: ExchangePlan, queue: Queue, turn: jax.Array) -> Copies | None:
    """Of the tokens whose turn it is; None if there is one node."""
    if plan.nodes == 1:
        return None
    target_TN = jnp.broadcast_to(jnp.arange(plan.nodes, dtype=jnp.int32), queue.goes_TN.shape)
    rows = plan.node_rows(len(queue.goes_TN))
    return _buckets(queue.goes_TN, target_TN, queue.place_TN, rows, plan.nodes, turn)


def local_table(
    plan: ExchangePlan, experts_RK: jax.Array, tokens: int, turn: jax.Array
) -> tuple[Copies, jax.Array, jax.Array]:
    """Of the rows that hop 1 has brought, whose experts are given (-1 for none), those whose turn
    it is; each copy's expert on its device; and how many turns they take.
    """
    per_node = plan.num_experts // plan.nodes
    here_RK = experts_RK - per_node * lax.axis_index(NODE)
    goes_RK = (here_RK >= 0) & (here_RK < per_node)
    target_RK = jnp.where(goes_RK, here_RK // plan.num_local, plan.locals)
    onehot_JG = target_RK.reshape(-1, 1) == jnp.arange(plan.locals, dtype=jnp.int32)[None]
    count_JG = running_count(onehot_JG)
    place_J = jnp.where(onehot_JG, count_JG - 1, 0).sum(-1, dtype=jnp.int32)
    rows = plan.local_rows(tokens, experts_RK.shape[1])
    place_RK = place_J.reshape(goes_RK.shape)
    table = _buckets(goes_RK, target_RK, place_RK, rows, plan.locals, turn)
    return table, here_RK % plan.num_local, _rounds(count_JG[-1], rows)
