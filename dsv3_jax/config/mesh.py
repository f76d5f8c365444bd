"""How a run is spread over devices."""

import math
from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check, check_types
from dsv3_jax.config.model import ModelConfig

AXES = ("pipe", "data", "node", "local")
MAX_DEVICES = 2**20
ROW_AXES = {"none": (), "local": ("local",), "node_local": ("node", "local")}


@dataclass(frozen=True)
class MeshConfig:
    """Devices in a grid. Experts are spread over node x local; tokens, and the optimiser's state,
    over data x node x local (report 3.2).
    """

    pipe: int = 1
    """Pipeline ranks, each with stages of its own: see the options of pipeline"""
    data: int = 1
    """Groups of node x local devices, each of which holds all experts"""
    node: int = 1
    """Nodes that a group's experts are spread over"""
    local: int = 1
    """Devices in a node"""
    bucket_factor: float = 1.25
    """Room of a bucket, in shares of a device under even routing. What finds none goes in further
    rounds: larger is fewer rounds and more memory"""
    sequence: Literal["none", "local", "node_local"] = "none"
    """Devices that each row is split over: none, a node's, or those of all nodes of a group"""

    def __post_init__(self) -> None:
        check_types("mesh", self)
        for name in AXES:
            size = getattr(self, name)
            check(f"mesh.{name}", size, 1 <= size <= MAX_DEVICES, f"1 to {MAX_DEVICES:,}")
        factor = self.bucket_factor
        check("mesh.bucket_factor", factor, 0 < factor <= 1024, "above 0, up to 1024")

    @property
    def sizes(self) -> dict[str, int]:
        """Of each axis."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self.sizes.values())

    @property
    def token_shards(self) -> int:
        """Devices that have tokens of their own."""
        return self.data * self.node * self.local

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axes that a row is split over."""
        return ROW_AXES[self.sequence]

    @property
    def row_shards(self) -> int:
        """Devices that share a row."""
        return math.prod(getattr(self, axis) for axis in self.row_axes)

    @property
    def row_groups(self) -> int:
        """Groups of devices that have rows of their own."""
        return self.token_shards // self.row_shards

    @property
    def expert_shards(self) -> int:
        """Devices that experts are spread over."""
        return self.node * self.local

    def nodes_per_token(self, model: ModelConfig) -> int:
        """Nodes that a token goes to, at most, whatever is chosen (report 2.1.2)."""
        nodes = min(self.node, model.experts_per_token)
        # A group lies on one node.
        return min(nodes, model.num_kept_groups) if model.num_groups > 1 else nodes

    def check_model(self, model: ModelConfig) -> None:
        """ValueError for a model whose experts cannot be spread like this."""
        if not model.num_moe_layers and not model.mtp_depth:
            return
        if model.num_experts % self.expert_shards:
            raise ValueError(
                f"model.num_experts is {model.num_experts}; allowed: multiples of the "
                f"{self.expert_shards} devices of mesh.node x mesh.local"
            )
        if model.num_groups > 1 and model.num_groups % self.node:
            raise ValueError(
                f"model.num_groups is {model.num_groups}; allowed: multiples of mesh.node = "
                f"{self.node}, so that a group's experts lie on one node, or 1 for no groups"
            )

    def check_rows(self, rows: int, microbatches: int) -> None:
        """ValueError for rows of a step that the devices cannot share evenly."""
        part = rows // microbatches
        if part % self.row_groups:
            sharing = f"{self.token_shards} devices of mesh.data x mesh.node x mesh.local"
            if self.row_shards > 1:
                sharing = f"{self.row_groups} groups of {self.row_shards} devices that share a row"
            raise ValueError(
                f"train.rows / train.microbatches is {part}; allowed: multiples of the {sharing}"
            )

    def check_length(self, length: int) -> None:
        """ValueError for rows that their devices cannot share evenly."""
        if self.row_shards > 1 and length % (2 * self.row_shards):
            raise ValueError(
                f"data.length is {length}; allowed: multiples of {2 * self.row_shards}, two chunks "
                f"for each of the {self.row_shards} devices that mesh.sequence = {self.sequence} "
                "splits a row over"
            )
