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


class PipelineRows:
    """Of one run with micro-batches of so many rows."""

    def __init__(self, meshes: Sequence[Mesh], size: int) -> None:
        self.meshes, self.size = meshes, size
        self.places = [NamedSharding(mesh, PER_DEVICE) for mesh in meshes]
        self.devices = meshes[0].size

    @property
    def is_alone(self) -> bool:
        """Whether one process has all devices."""
        return jax.process_count() == 1

    @cached_property
    def _shares(self) -> list[int]:
        """Places, in their ranks, of the devices that are in this process."""
        here = set()
        for mesh, place in zip(self.meshes, self.places, strict=True):
            if is_here(mesh):
                index = place.addressable_devices_indices_map((self.devices,)).values()
                here |= {d for (part,) in index for d in range(self.devices)[part]}
        return sorted(here)

    def own_rows(self, rows: int) -> Sequence[int]:
        """Those of a batch of so many rows that this process's devices take, in order."""
        share = rows // self.devices
        return [row for d in self._shares for row in range(d * share, (d + 1) * share)]

    def count(self, own: int) -> int:
        """Micro-batches in a batch of which this process has so many rows."""
        return own * self.devices // len(self._shares) // self.size

    def microbatch(self, rank: int, batch: Batch, number: int, count: int) -> Batch:
        """One of `count` micro-batches on a rank's devices, of a batch of `own_rows`: of each
        device's rows a part.
        """
        part = self.size // self.devices

        def rows(index: tuple[slice, ...], x: np.ndarray) -> np.ndarray:
            device = (index[0].start or 0) // part
            start = self._shares.index(device) * count * part + number * part
            return x[start : start + part]

        def put(x: np.ndarray | None) -> jax.Array | None:
            if x is None:
                return None
            x = np.asarray(x)
            return jax.make_array_from_callback(
                (self.size, *x.shape[1:]), self.places[rank], lambda index: rows(index, x)
            )

        return Batch(*map(put, batch))
