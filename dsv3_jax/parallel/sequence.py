"""Rows that are split over devices, for sequences too long for one (report 4.3).

A row of T tokens is cut into 2 n chunks for n devices, and device i has chunks i and 2 n - 1 - i.
Under a causal mask an early chunk sees few keys and a late one many; together each pair sees as
many as any other. Devices exchange what attention needs of a row, its latents; all else that looks
along a row (places, the next tokens' ids, segments) is numbers of tokens, gathered whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.config.mesh import MeshConfig


@dataclass(frozen=True)
class RowShards:
    """The devices that share a row, within a `shard_map`: `size` along `axes`, at least 2."""

    axes: tuple[str, ...]
    size: int

    def places(self, tokens: int) -> jax.Array:
        """Of this device's tokens in their row, int32 [tokens], ascending."""
        return self.own(jnp.arange(tokens * self.size, dtype=jnp.int32)[None])[0]

    def own(self, x_BT: jax.Array) -> jax.Array:
        """This device's part of whole rows [B, T, ...] -> [B, T / n, ...]."""
        chunk = x_BT.shape[1] // (2 * self.size)
        device = lax.axis_index(self.axes)
        starts = device * chunk, (2 * self.size - 1 - device) * chunk
        parts = [lax.dynamic_slice_in_dim(x_BT, start, chunk, axis=1) for start in starts]
        return jnp.concatenate(parts, 1)

    def gathered(self, x_BT: jax.Array) -> jax.Array:
        """All devices' parts side by side: [B, T / n, ...] -> [B, T, ...]."""
        return lax.all_gather(x_BT, self.axes, axis=1, tiled=True)

    def place_in_gathered(self, block: jax.Array, blocks_of_chunk: int) -> jax.Array:
        """Where a block of a row, one of equal blocks, stands in `gathered` parts."""
        chunk, rest = jnp.divmod(block, blocks_of_chunk)
        late = 2 * (2 * self.size - 1 - chunk) + 1
        return jnp.where(chunk < self.size, 2 * chunk, late) * blocks_of_chunk + rest

    def whole(self, x_BT: jax.Array) -> jax.Array:
        """Rows from all devices' parts, in order: [B, T / n, ...] -> [B, T, ...]."""
        x_BT = self.gathered(x_BT)
        b, t, *inner = x_BT.shape
        x_BncT = x_BT.reshape(b, self.size, 2, t // (2 * self.size), *inner)
        chunks = x_BncT[:, :, 0], jnp.flip(x_BncT[:, :, 1], 1)
        return jnp.concatenate(chunks, 1).reshape(x_BT.shape)

    def sum(self, x: jax.Array) -> jax.Array:
        """Over the devices of a row."""
        return lax.psum(x, self.axes)


def make_row_shards(mesh: MeshConfig) -> RowShards | None:
    """Of a run; None where a device has whole rows."""
    if mesh.row_shards == 1:
        return None
    return RowShards(mesh.row_axes, mesh.row_shards)


@dataclass(frozen=True)
class RowPlaces:
    """Where rows lie on `devices` devices in a line, of which every `shards` share their rows.

    An array of them is one of parts of rows [rows * shards, T / shards], device by device.
    """

    devices: int
    shards: int

    @property
    def groups(self) -> int:
        """Of devices that share their rows."""
        return self.devices // self.shards

    def rows_of(self, device: int, rows: int) -> range:
        """Those of a batch of `rows` that a device has a part of."""
        share = rows // self.groups
        group = device // self.shards
        return range(group * share, (group + 1) * share)

    def own_rows(self, devices: Iterable[int], rows: int) -> list[int]:
        """Those that any of these devices has a part of, in order."""
        return sorted({row for device in devices for row in self.rows_of(device, rows)})

    def part(self, x_BT: np.ndarray, device: int) -> np.ndarray:
        """A device's part of its rows [B, T] -> [B, T / shards]."""
        if self.shards == 1:
            return x_BT
        return np.concatenate(self._chunks(x_BT, device), 1)

    def joined(self, parts_BT: np.ndarray, rows: int) -> np.ndarray:
        """`rows` whole rows from all devices' parts, device by device: `part` undone."""
        whole_BT = np.empty((rows, parts_BT.shape[1] * self.shards), parts_BT.dtype)
        for device, own_BT in enumerate(np.split(parts_BT, self.devices)):
            places = self.rows_of(device, rows)
            whole = whole_BT[places.start : places.stop]
            chunks = self._chunks(whole, device)
            for chunk, found in zip(chunks, np.split(own_BT, len(chunks), axis=1), strict=True):
                chunk[...] = found
        return whole_BT

    def _chunks(self, x_BT: np.ndarray, device: int) -> list[np.ndarray]:
        """Views of those of a device, in whole rows."""
        if self.shards == 1:
            return [x_BT]
        chunks, place = np.split(x_BT, 2 * self.shards, axis=1), device % self.shards
        return [chunks[place], chunks[2 * self.shards - 1 - place]]
