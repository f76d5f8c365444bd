"""Arrays that cross between ranks of a pipeline: swaps of neighbours, sums of all.

What crosses has a leading dimension that is spread over all devices of its rank. Of several ranks
it becomes one array on their joint mesh, without a copy; a small program with one collective over
`pipe` runs there. So ranks may be of one process or of several, each of which has the arrays of its
own ranks alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.parallel.mesh import PIPE, TOKEN_AXES

Ways = tuple[tuple[int, int], ...]  # pairs of places among the ranks

PER_DEVICE = PartitionSpec(TOKEN_AXES)
JOINED = PartitionSpec((PIPE, *TOKEN_AXES))


def rank_meshes(mesh: Mesh) -> tuple[Mesh, ...]:
    """Each pipeline rank's own devices, on the other axes."""
    axes = (AxisType.Explicit,) * len(TOKEN_AXES)
    return tuple(Mesh(devices, TOKEN_AXES, axis_types=axes) for devices in mesh.devices)


def is_here(mesh: Mesh) -> bool:
    """Whether this process has devices of a rank."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)


class Crossings:
    """Between the ranks of one pipeline."""

    def __init__(self, meshes: Sequence[Mesh]) -> None:
        self.meshes = tuple(meshes)
        self.places = [NamedSharding(mesh, PER_DEVICE) for mesh in meshes]
        self._zeros = cache(self._made_zeros)
        self._program = cache(self._made_program)
        self._joint = cache(self._made_joint)

    def swap(
        self, left: int, rightward: jax.Array | None, leftward: jax.Array | None, like: Any
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Of the ranks `left` and `left` + 1: what the first one gets, and the other one.

        Given and returned is what this process has. A message of shape and dtype `like` goes each
        way that has one of it; `like` holds two of them, or None.
        """
        ways = tuple(pair for pair, to in zip(((0, 1), (1, 0)), like, strict=True) if to)
        struct = like[0] or like[1]
        given = {left: rightward, left + 1: leftward}
        ranks = (left, left + 1)
        found = self._run(ranks, ways, given, struct)
        return found[left] if like[1] else None, found[left + 1] if like[0] else None

    def send(self, source: int, target: int, tree: Any, like: Any) -> Any:
        """A tree of arrays from one rank to another: the target's, if it is here."""
        return self._run((source, target), ((0, 1),), {source: tree}, like)[target]

    def summed(self, trees: Mapping[int, Any], like: Any) -> dict[int, Any]:
        """Every rank's share of a tree -> on every rank the sum over ranks."""
        return self._run(tuple(range(len(self.meshes))), None, trees, like)

    def _run(
        self, ranks: tuple[int, ...], ways: Ways | None, given: Mapping[int, Any], like: Any
    ) -> dict[int, Any]:
        """What comes of a tree `like` that some ranks give: moved along ways, or the sum."""
        leaves, tree = jax.tree.flatten(like)
        here = [rank for rank in ranks if is_here(self.meshes[rank])]
        if not here:
            return dict.fromkeys(ranks)
        parts = {}
        for rank in here:
            own = given.get(rank)
            parts[rank] = (
                [self._zeros(rank, x.shape, x.dtype) for x in leaves]
                if own is None
                else jax.tree.leaves(own)
            )
        joined = [
            _as_one([parts[rank][i] for rank in here], len(ranks), self._joint(ranks))
            for i in range(len(leaves))
        ]
        results = self._program(ranks, ways)(joined)
        found = dict.fromkeys(ranks)
        for rank in here:
            found[rank] = tree.unflatten([_part(x, self.places[rank]) for x in results])
        return found

    def _made_joint(self, ranks: tuple[int, ...]) -> NamedSharding:
        devices = np.stack([self.meshes[rank].devices for rank in ranks])
        types = (AxisType.Explicit,) * devices.ndim
        return NamedSharding(Mesh(devices, (PIPE, *TOKEN_AXES), axis_types=types), JOINED)

    def _made_program(self, ranks: tuple[int, ...], ways: Ways | None) -> Callable:
        mesh, body = self._joint(ranks).mesh, partial(_permuted, ways=ways) if ways else _summed
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=JOINED, out_specs=JOINED))

    def _made_zeros(self, rank: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """What a rank that sends nothing gives to a program."""
        place = self.places[rank]
        part = np.zeros(place.shard_shape(shape), dtype)
        return jax.make_array_from_callback(shape, place, lambda _: part)


def _permuted(arrays: list[jax.Array], ways: Ways) -> list[jax.Array]:
    return [lax.ppermute(x, PIPE, ways) for x in arrays]


def _summed(arrays: list[jax.Array]) -> list[jax.Array]:
    return [lax.pcast(lax.psum(x, PIPE), PIPE, to="varying") for x in arrays]


def _as_one(parts: Sequence[jax.Array], ranks: int, place: NamedSharding) -> jax.Array:
    shape = (ranks * parts[0].shape[0], *parts[0].shape[1:])
    shards = [shard.data for part in parts for shard in part.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, place, shards)


def _part(joined: jax.Array, place: NamedSharding) -> jax.Array:
    on = {device.id for device in place.mesh.devices.flat}
    shards = [shard.data for shard in joined.addressable_shards if shard.device.id in on]
    rows = shards[0].shape[0] * len(on)
    return jax.make_array_from_single_device_arrays((rows, *joined.shape[1:]), place, shards)
