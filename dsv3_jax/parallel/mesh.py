"""The grid of devices, and where weights lie on it (report 3.2).

Axes: `pipe` ranks of a pipeline, `data` groups of devices that each hold all experts, `node` and
`local` the nodes of a group and the devices of a node. Experts are sharded over node and local,
tokens over data, node and local. Axes of one device are normal.

Within `jax.shard_map` values are typed by the axes over which they differ; `varying` and
`varying_like` say so where JAX cannot know: of weights before they enter a derivative rule, of the
first carry of a loop.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dsv3_jax.config.mesh import AXES, MeshConfig

PIPE, DATA, NODE, LOCAL = AXES
STACKS = ("dense_layers", "moe_layers")  # first names of parameters with a dimension of layers
TOKEN_AXES = (DATA, NODE, LOCAL)
EXPERT_AXES = (NODE, LOCAL)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration. ValueError if there are too few devices.

    Given devices are taken in their order, `local` fastest. Otherwise JAX's own, laid out by JAX as
    their topology suggests: in their order where it knows none, as on CPUs.
    """
    shape = tuple(cfg.sizes.values())
    found = jax.devices() if devices is None else list(devices)
    if len(found) < cfg.size:
        raise ValueError(
            f"mesh has {' x '.join(map(str, shape))} = {cfg.size} devices ({', '.join(AXES)}); "
            f"here are {len(found)} (--devices {cfg.size} emulates them on a CPU)"
        )
    found, types = found[: cfg.size], (AxisType.Explicit,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, types, devices=found)
    return Mesh(np.array(found).reshape(shape), AXES, axis_types=types)


def weight_spec(name: str) -> PartitionSpec:
    """How a weight lies on the mesh while it is computed with.

    The letters that end a parameter's name name its dimensions; behind a dimension of layers in a
    stack. A first dimension of experts, E, is spread over node and local; all else is whole on
    every device.
    """
    if re.search(r"_E[A-Z]+$", name):
        return PartitionSpec(*[None] * is_stacked(name), EXPERT_AXES)
    return PartitionSpec()


def parameter_name(path: tuple) -> str:
    """Of a key path: `moe_layers.mla.w_o_HU_D`."""
    keys = (getattr(key, "key", getattr(key, "idx", None)) for key in path)
    return ".".join(str(key) for key in keys if key is not None)


def is_stacked(name: str) -> bool:
    """Whether a parameter of this name has a leading dimension of layers."""
    return name.partition(".")[0] in STACKS


def varying(tree: Any, axes: Sequence[str]) -> Any:
    """The same values, typed as differing over these axes too."""

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def varying_like(tree: Any, *others: Any) -> Any:
    """The same values, typed as differing over every axis over which any of the others does."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(others)))
    return varying(tree, tuple(axis for axis in AXES if axis in axes))


def varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
