"""Which device holds which part of a model: the pieces that tensors are read into and taken from.

Tensors are moved by programs of one device. So a process waits for no other, devices send each
other nothing while they are filled, and one device alone is the case of one piece.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from dsv3_jax.checkpoint.boxes import Box, box_of, whole
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.mesh import AXES
from dsv3_jax.parallel.mesh import EXPERT_AXES, weight_spec
from dsv3_jax.quant.fp8 import Blocked

Abstract = jax.ShapeDtypeStruct | Blocked


class Filling:
    """One value of a model on its way: on each of this process's devices the piece it will hold.

    Attributes:
        pieces: arrays or `Blocked`, one for each of `boxes`; whoever fills one puts it back.
        boxes: where each lies in the whole value.
    """

    def __init__(self, abstract: Abstract, sharding: Sharding | None) -> None:
        self.abstract, self.sharding = abstract, sharding
        self.boxes = _boxes(abstract.shape, sharding)
        self.pieces: list[jax.Array | Blocked] = []

    def abstract_piece(self) -> Abstract:
        """Shape and dtype of a piece; all are alike."""

        def piece(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = x.shape if self.sharding is None else self.sharding.shard_shape(x.shape)
            return jax.ShapeDtypeStruct(shape, x.dtype)

        return jax.tree.map(piece, self.abstract)

    def places(self, index: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
        """Numbers of the pieces that a tensor goes into, and its index in each."""
        found = ((number, box.index(index)) for number, box in enumerate(self.boxes))
        return [(number, at) for number, at in found if at is not None]

    def whole(self) -> jax.Array | Blocked:
        """The value, of which the pieces are the memory."""
        if self.sharding is None:
            return self.pieces[0]

        def joined(x: jax.ShapeDtypeStruct, *pieces: jax.Array) -> jax.Array:
            return jax.make_array_from_single_device_arrays(
                x.shape, self.sharding, pieces, dtype=x.dtype
            )

        return jax.tree.map(joined, self.abstract, *self.pieces)


def fillings(abstract: Mapping[tuple, Abstract], mesh: Mesh | None) -> dict[tuple, Filling]:
    """Zeros for every value, by path, each as `weight_spec` of its name says; without a mesh, whole
    on JAX's default device.
    """
    if mesh is None:
        found = {path: Filling(x, None) for path, x in abstract.items()}
        devices: list[Sharding | None] = [None]
    else:
        found = {
            path: Filling(x, NamedSharding(mesh, weight_spec(".".join(map(str, path)))))
            for path, x in abstract.items()
        }
        devices = [SingleDeviceSharding(d) for d in mesh.local_devices]
    pieces = tuple(filling.abstract_piece() for filling in found.values())
    for device in devices:
        for filling, zeros in zip(found.values(), _allocation(pieces, device)(), strict=True):
            filling.pieces.append(zeros)
    return found


@cache
def _allocation(abstract: tuple[Abstract, ...], device: Sharding | None) -> Callable[[], tuple]:
    """The program that makes zeros on a device."""

    def zeros() -> tuple[jax.Array | Blocked, ...]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)

    return jax.jit(zeros, out_shardings=device)


def _boxes(shape: tuple[int, ...], sharding: Sharding | None) -> list[Box]:
    """Of every device of this process, in the mesh's order."""
    if sharding is None:
        return [whole(shape)]
    indices = sharding.addressable_devices_indices_map(shape)
    return [box_of(indices[d], shape) for d in sharding.mesh.local_devices]


def check_mesh(mesh: Mesh, cfg: ModelConfig) -> None:
    """ValueError for a mesh of other axes, or over which the experts cannot be spread evenly."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh is a {type(mesh).__name__}; allowed: a jax.sharding.Mesh, as "
            "dsv3_jax.parallel.mesh.make_mesh makes of a MeshConfig"
        )
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh has axes {', '.join(mesh.axis_names)}; allowed: {', '.join(AXES)}")
    sizes = [mesh.shape[axis] for axis in EXPERT_AXES]
    if cfg.num_experts % (sizes[0] * sizes[1]) and (cfg.num_moe_layers or cfg.mtp_depth):
        raise ValueError(
            f"{cfg.num_experts} experts on a mesh of node {sizes[0]} x local {sizes[1]} = "
            f"{sizes[0] * sizes[1]} devices; allowed: node x local that divides {cfg.num_experts}"
        )


def holder(
    value: jax.Array | Blocked, index: tuple[int, ...]
) -> tuple[jax.Array | Blocked, tuple[int, ...]] | None:
    """A piece that holds the whole tensor at `index`, and its index there; None where no one device
    of this process does.
    """
    for shards in zip(*(x.addressable_shards for x in jax.tree.leaves(value)), strict=True):
        box = box_of(shards[0].index, value.shape)
        at = box.index(index)
        if at is not None and box.shape[len(index) :] == value.shape[len(index) :]:
            pieces = [shard.data for shard in shards]
            return jax.tree.unflatten(jax.tree.structure(value), pieces), at
    return None


def held_whole(x: jax.Array) -> bool:
    """Whether devices of this process hold all of an array, once at least."""
    if x.is_fully_addressable:
        return True
    everywhere = x.sharding.devices_indices_map(x.shape).values()
    here = x.sharding.addressable_devices_indices_map(x.shape).values()
    return {box_of(i, x.shape) for i in here} == {box_of(i, x.shape) for i in everywhere}


@contextlib.contextmanager
def off_any_mesh() -> Iterator[None]:
    """For programs of one device: within `jax.set_mesh` of several, JAX refuses them."""
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield
