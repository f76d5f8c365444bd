"""Experts of an engine: where they lie, and their moves while it serves (report 3.4.1).

When it is time, experts are placed anew by the loads since; then weights move one layer at a time,
between two turns of the engine. A layer's weights and its tables change together, so every step
sees the same function of its tokens.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.fields import check
from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.inference.balancer import Balancer, Rebalanced
from dsv3_jax.inference.expert_slots import moved, slots_of, weights_of
from dsv3_jax.inference.forward import Experts
from dsv3_jax.inference.served_experts import Placement, make_serving_plan
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import Depth, Layer, Weights

# Below, weights would move for nothing: at 5 % drift EPLB moves two thirds of a layer's slots over
# 32 devices, for a load of the busiest that is 3 % less.
LEAST_GAIN = 0.05


class ExpertService:
    """Of one engine; `experts` is what its programs are made with."""

    def __init__(
        self,
        model: ModelConfig,
        settings: EngineConfig,
        mesh: Mesh | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """ValueError for experts that cannot be spread over the mesh."""
        shape = MeshConfig(bucket_factor=settings.bucket_factor)
        if mesh is not None:
            shape = MeshConfig(**dict(mesh.shape), bucket_factor=settings.bucket_factor)
            check("the mesh's pipe", shape.pipe, shape.pipe == 1, "1: an engine has no stages")
            shape.check_model(model)
        self._mesh, self._shared = mesh, settings.shared_as_routed
        shared = model.num_shared_experts * settings.shared_as_routed
        slots = model.num_experts + shared + settings.replicas
        plan = make_serving_plan(
            shape,
            model,
            slots,
            shared_as_routed=settings.shared_as_routed,
            grouped=settings.placement == "hierarchical" or slots == model.num_experts,
        )
        self.experts = Experts(plan, settings.shared_as_routed)
        self.loads = model.num_moe_layers + settings.drafts
        """Layers with routers"""
        self.balancer: Balancer | None = None
        if slots > model.num_experts and self.loads:
            self.balancer = Balancer(
                model,
                shape,
                slots,
                settings.placement,
                shared_as_routed=settings.shared_as_routed,
                num_layers=self.loads,
                seconds=settings.rebalance_seconds,
                half_life=settings.rebalance_seconds,
                least_gain=LEAST_GAIN,
                clock=clock,
            )
        self._where = [] if self.balancer is None else [*self.balancer.tables[0]]
        self.moving: list[int] = []
        """Layers that are placed anew and not yet moved"""
        self.last: Rebalanced | None = None
        """What the last placement changed"""

    # --- weights ---------------------------------------------------------------------------------

    def laid_out(self, weights: Weights) -> Weights:
        """Experts in their slots, with the tables."""
        if self.balancer is None:
            return weights
        for index in range(self.loads):
            weights = self._with_layer(weights, index, self._in_slots)
        return weights

    def _in_slots(self, layer: Layer, index: int) -> Layer:
        block = jax.tree.map(lambda x: x, layer.block)
        block.moe = slots_of(
            block.moe, self._where[index], self._mesh, shared_as_routed=self._shared
        )
        return layer._replace(block=block, placement=self._placement(index))

    def _placement(self, index: int) -> Placement:
        _, physical_LEC, count_LE = self.balancer.tables
        return Placement(jnp.asarray(physical_LEC[index]), jnp.asarray(count_LE[index]))

    def _with_layer(
        self, weights: Weights, index: int, change: Callable[[Layer, int], Layer]
    ) -> Weights:
        """The weights with the `index`-th layer that has a router changed, MTP's behind the main
        model's.
        """
        layers, depths = list(weights.layers), list(weights.depths)
        routed = [i for i, layer in enumerate(layers) if hasattr(layer.block, "moe")]
        if index < len(routed):
            layers[routed[index]] = change(layers[routed[index]], index)
        else:
            place = index - len(routed)
            layer = change(depths[place].layer, index)
            depths[place] = Depth(layer, depths[place].rest)
        return weights._replace(layers=tuple(layers), depths=tuple(depths))

    # --- while it serves -------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether loads should be looked at."""
        return self.balancer is not None and not self.moving and self.balancer.due

    def place(self, load_LE: np.ndarray) -> None:
        """By these loads since the last time. What moves does so in the next `move`s."""
        self.balancer.add(load_LE)
        self.last = self.balancer.rebalance()
        self.moving = np.flatnonzero(
            (self.last.tables.physical_to_logical_LP != np.array(self._where)).any(-1)
        ).tolist()

    def move(self, weights: Weights) -> Weights:
        """One layer that has to, if there is any."""
        if not self.moving:
            return weights
        index = self.moving.pop(0)
        weights = self._with_layer(weights, index, self._moved)
        self._where[index] = self.balancer.tables.physical_to_logical_LP[index]
        return weights

    def warm_up(self, weights: Weights) -> None:
        """Compiles what `move` needs; nothing moves."""
        if self.balancer is not None:
            for index in range(self.loads):
                self._with_layer(weights, index, self._moved)

    def _moved(self, layer: Layer, index: int) -> Layer:
        new_P = self.balancer.tables.physical_to_logical_LP[index]
        found = moved(weights_of(layer.block.moe), self._where[index], new_P, self._mesh)
        block = jax.tree.map(lambda x: x, layer.block)
        moe = block.moe
        for name, value in zip(("w_gate_EDF", "w_up_EDF", "w_down_EFD"), found, strict=True):
            setattr(moe, name, getattr(moe, name).replace(value))
        return layer._replace(block=block, placement=self._placement(index))
