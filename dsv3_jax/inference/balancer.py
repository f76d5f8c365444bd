"""When and where copies of experts move: loads in, tables out (report 3.4.1, 3.4.2).

On the host, in plain NumPy. Loads are summed, those of one half-life ago at half their weight. From
time to time, every 10 minutes in the report, `parallel.eplb` places copies anew: within the nodes
of their groups for prefill (hierarchical), anywhere for decoding (global). Devices that EPLB thinks
alike then change places, and so do the slots of a device, so that what can stay does; and a layer
that would gain too little stays as it is.
"""

import time
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.config.fields import check
from dsv3_jax.parallel.eplb import rebalance_experts

Policy = Literal["hierarchical", "global"]


class Tables(NamedTuple):
    """Where experts are, all int32: logical expert of every slot [L, P]; slots of every expert
    [L, E, C], -1 behind the last; how many they are [L, E].

    Layer by layer the last two are a `served_experts.Placement`. C is as many as there can be, so
    that the sizes never change.
    """

    physical_to_logical_LP: np.ndarray
    physical_LEC: np.ndarray
    count_LE: np.ndarray


class Rebalanced(NamedTuple):
    """What `Balancer.rebalance` found. Loads are those of the past; the future may differ."""

    tables: Tables
    before_L: np.ndarray
    """Load of the busiest device over the mean, as experts were placed; 1 without any load"""
    after_L: np.ndarray
    """As they are placed now"""
    moves_L: np.ndarray
    """int: slots whose expert comes from another device"""


class Balancer:
    """Of one serving unit: all layers' loads, and where their experts are."""

    def __init__(
        self,
        model: ModelConfig,
        mesh: MeshConfig,
        num_slots: int,
        policy: Policy,
        *,
        shared_as_routed: bool = False,
        num_layers: int | None = None,
        seconds: float = 600,
        half_life: float = 600,
        least_gain: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with the placement of equal loads, in which shared experts have every token.

        Args:
            num_slots: P, physical experts of a layer, on the devices of mesh.node x mesh.local.
            shared_as_routed: whether shared experts are logical experts, behind the routed ones.
            num_layers: whose loads come; None: the MoE layers of the main model.
            seconds: between two placements, of `clock`.
            least_gain: by what share the load of a layer's busiest device must fall, and more, for
                its experts to move.

        ValueError for sizes that do not divide, or hierarchical placement where there is none: with
        groups that do not divide among the nodes, or with routed shared experts, which have no
        group.
        """
        check(
            "policy",
            repr(policy),
            policy in get_args(Policy),
            ", ".join(map(repr, get_args(Policy))),
        )
        shared = model.num_shared_experts * shared_as_routed
        self._groups, self._nodes = 1, 1
        if policy == "hierarchical":
            check("shared experts as routed ones", shared, not shared, "none (hierarchical policy)")
            self._groups, self._nodes = model.num_groups, mesh.node
            what = f"multiples of mesh.node = {mesh.node} (hierarchical policy)"
            check("model.num_groups", self._groups, not self._groups % self._nodes, what)
        self._devices, self._per_node = mesh.expert_shards, mesh.expert_shards // self._nodes
        self._slots, self._experts = num_slots, model.num_experts + shared
        self._seconds, self._half_life, self._clock = seconds, half_life, clock
        self._least_gain = least_gain
        layers = model.num_moe_layers if num_layers is None else num_layers
        even_E = np.full(self._experts, model.experts_per_token / model.num_experts)
        even_E[model.num_experts :] = 1
        self._table_LP = self._placed(np.tile(even_E, (layers, 1)))
        self._load_LE = np.zeros((layers, self._experts))
        self._added = self._placed_at = clock()

    @property
    def tables(self) -> Tables:
        """As experts are placed."""
        layers, most = len(self._table_LP), (self._slots - self._experts) // self._nodes + 1
        physical_LEC = np.full((layers, self._experts, most), -1, np.int32)
        count_LE = np.zeros((layers, self._experts), np.int32)
        row_L = np.arange(layers)
        for slot, expert_L in enumerate(self._table_LP.T):
            physical_LEC[row_L, expert_L, count_LE[row_L, expert_L]] = slot
            count_LE[row_L, expert_L] += 1
        return Tables(self._table_LP.astype(np.int32), physical_LEC, count_LE)

    def add(self, load_LE: np.ndarray) -> None:
        """Tokens of every layer's logical experts since the last time, of all devices together."""
        load_LE = np.asarray(load_LE)
        assert load_LE.shape == self._load_LE.shape, (load_LE.shape, self._load_LE.shape)
        now = self._clock()
        self._load_LE *= 0.5 ** ((now - self._added) / self._half_life)
        self._load_LE += load_LE
        self._added = now

    @property
    def due(self) -> bool:
        """Whether it is time to place experts anew."""
        return self._clock() - self._placed_at >= self._seconds

    def rebalance(self) -> Rebalanced:
        """Places experts anew, of the layers that gain by it."""
        old_LP = self._table_LP
        new_LP = self._placed(self._load_LE)
        before_L, after_L = self._imbalance(old_LP), self._imbalance(new_LP)
        gains_L = after_L < before_L * (1 - self._least_gain)
        pairs = zip(old_LP, new_LP, gains_L, strict=True)
        new_LP = np.stack([self._stayed(old, new) if gains else old for old, new, gains in pairs])
        self._table_LP, self._placed_at = new_LP, self._clock()
        moves = [self._arrivals(old, new) for old, new in zip(old_LP, new_LP, strict=True)]
        after_L = np.where(gains_L, after_L, before_L)
        return Rebalanced(self.tables, before_L, after_L, np.array(moves))

    def _placed(self, load_LE: np.ndarray) -> np.ndarray:
        sizes = self._slots, self._groups, self._nodes, self._devices
        return rebalance_experts(load_LE, *sizes)[0]

    def _imbalance(self, table_LP: np.ndarray) -> np.ndarray:
        """Each expert's load is split evenly between its copies."""
        count_LE = np.stack([np.bincount(row, minlength=self._experts) for row in table_LP])
        share_LP = np.take_along_axis(self._load_LE / count_LE, table_LP, 1)
        load_LW = share_LP.reshape(len(table_LP), self._devices, -1).sum(-1)
        mean_L = load_LW.mean(1)
        return np.where(mean_L > 0, load_LW.max(1) / np.where(mean_L > 0, mean_L, 1), 1)

    # --- what can stay --------------------------------------------------------------------------

    def _stayed(self, old_P: np.ndarray, new_P: np.ndarray) -> np.ndarray:
        """The new table of a layer with devices, and slots on each, in another order.

        Devices of a node (all devices, for the global policy) are alike, and so are nodes. The pair
        of an old place and a new one that has most experts in common is put together first.
        """
        held_WE, wanted_WE = (self._held(table_P) for table_P in (old_P, new_P))
        common_WW = held_WE @ wanted_WE.T
        nodes = self._devices // self._per_node
        by_node = common_WW.reshape(nodes, self._per_node, nodes, self._per_node)
        order_W = np.empty(self._devices, int)
        for old_node, new_node in enumerate(_paired(by_node.sum((1, 3)))):
            first = new_node * self._per_node
            here = np.arange(self._per_node) + old_node * self._per_node
            order_W[here] = first + _paired(by_node[old_node, :, new_node])
        new_WI = new_P.reshape(self._devices, -1)[order_W]
        old_WI = old_P.reshape(self._devices, -1)
        return np.concatenate([_in_place(o, n) for o, n in zip(old_WI, new_WI, strict=True)])

    def _held(self, table_P: np.ndarray) -> np.ndarray:
        """[W, E]: whether a device has the expert."""
        held_WE = np.zeros((self._devices, self._experts), int)
        held_WE[np.arange(self._slots) // (self._slots // self._devices), table_P] = 1
        return held_WE

    def _arrivals(self, old_P: np.ndarray, new_P: np.ndarray) -> int:
        here_P = np.arange(self._slots) // (self._slots // self._devices)
        return int((self._held(old_P)[here_P, new_P] == 0).sum())


def _paired(common_AB: np.ndarray) -> np.ndarray:
    """For every row a column of its own, the largest number first."""
    left_AB, column_A = common_AB.astype(float), np.empty(len(common_AB), int)
    for _ in column_A:
        row, column = np.unravel_index(left_AB.argmax(), left_AB.shape)
        column_A[row] = column
        left_AB[row], left_AB[:, column] = -1, -1
    return column_A


def _in_place(old_I: np.ndarray, new_I: np.ndarray) -> np.ndarray:
    """The new experts of a device, those that it has already where they are."""
    left = list(new_I)
    found_I = np.full(len(new_I), -1)
    for i, expert in enumerate(old_I):
        if expert in left:
            left.remove(expert)
            found_I[i] = expert
    found_I[found_I < 0] = left
    return found_I
