"""Rows of a batch on the ranks of a pipeline: every rank has all of a micro-batch's, spread over
its devices as over those of a run without pipeline.
"""

from collections.abc import Sequence
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.neighbours import PER_DEVICE, is_here
from dsv3_jax.parallel.sequence import RowPlaces


class PipelineRows:
    """Of one run with micro-batches of so many rows, each shared by `shards` devices of a rank."""

    def __init__(self, meshes: Sequence[Mesh], size: int, shards: int = 1) -> None:
        self.meshes, self.size = meshes, size
        self.places = [NamedSharding(mesh, PER_DEVICE) for mesh in meshes]
        self.rows = RowPlaces(meshes[0].size, shards)

    @property
    def is_alone(self) -> bool:
        """Whether one process has all devices."""
        return jax.process_count() == 1

    @cached_property
    def _devices(self) -> list[int]:
        """Places, in their ranks, of the devices that are in this process."""
        here = set()
        for mesh, place in zip(self.meshes, self.places, strict=True):
            if is_here(mesh):
                devices = self.rows.devices
                index = place.addressable_devices_indices_map((devices,)).values()
                here |= {d for (part,) in index for d in range(devices)[part]}
        return sorted(here)

    def own_rows(self, rows: int) -> Sequence[int]:
        """Those of a batch of so many rows that this process's devices take, in order."""
        return self.rows.own_rows(self._devices, rows)

    def count(self, own: int) -> int:
        """Micro-batches in a batch of which this process has so many rows."""
        groups = {device // self.rows.shards for device in self._devices}
        return own * self.rows.groups // len(groups) // self.size

    def microbatch(self, rank: int, batch: Batch, number: int, count: int) -> Batch:
        """One of `count` micro-batches on a rank's devices, of a batch of `own_rows`: of each
        device's rows some.
        """
        share = self.size // self.rows.groups
        found = {row: i for i, row in enumerate(self.own_rows(count * self.size))}

        def part(index: tuple[slice, ...], x: np.ndarray) -> np.ndarray:
            device = (index[0].start or 0) // share
            first = found[self.rows.rows_of(device, count * self.size).start] + number * share
            return self.rows.part(x[first : first + share], device)

        def put(x: np.ndarray | None) -> jax.Array | None:
            if x is None:
                return None
            x = np.asarray(x)
            shape = self.size * self.rows.shards, x.shape[1] // self.rows.shards
            return jax.make_array_from_callback(
                shape, self.places[rank], lambda index: part(index, x)
            )

        return Batch(*map(put, batch))
