"""ZeRO-1: masters, moments and the update spread over the devices that have tokens (report 3.2).

Every tensor is stored in shards along a dimension that the number of devices divides: dense ones
over data, node and local, experts, which lie on node and local anyway, over data. Before the first
forward pass of a step they are gathered, behind its last backward pass gradients are summed and
scattered; both once, however many micro-batches there are. Gains of norms stay whole on every
device: they are a ten-thousandth of a model, and collectives have latency.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, combinations
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.mesh import TOKEN_AXES, is_stacked, varying, weight_spec


def stored_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a master of this name and shape lies on a mesh of these sizes.

    Where no dimension is a multiple of all devices, it is spread over fewer axes, and whole over
    the others.
    """
    spec = list(weight_spec(name))
    spec += [None] * (len(shape) - len(spec))
    first = int(is_stacked(name))  # layers stay together
    if len(shape) - first < 2:
        return PartitionSpec(*spec)
    free = [axis for axis in TOKEN_AXES if axis not in _axes_of(spec)]
    for group in _subsets(free, sizes):
        parts = math.prod(sizes[axis] for axis in group)
        fits = [d for d in range(first, len(shape)) if not spec[d] and shape[d] % parts == 0]
        if parts > 1 and fits:
            spec[max(fits, key=lambda d: shape[d])] = group
            break
    return PartitionSpec(*spec)


def _subsets(axes: list[str], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """All of them, most devices first."""
    groups = chain.from_iterable(combinations(axes, n + 1) for n in range(len(axes)))
    return sorted(groups, key=lambda group: -math.prod(sizes[axis] for axis in group))


def gathered(x: jax.Array, name: str, spec: PartitionSpec) -> jax.Array:
    """What is stored by `spec`, as it is computed with; within a `shard_map`."""
    for dim, axes in _spread(name, spec):
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return varying(x, TOKEN_AXES)


def summed_and_scattered(grad: jax.Array, name: str, spec: PartitionSpec) -> jax.Array:
    """`gathered` transposed: a gradient summed over all devices that hold the weight, the shard
    that `spec` stores here.
    """
    left = set(TOKEN_AXES) - _axes_of(weight_spec(name))
    for dim, axes in _spread(name, spec):
        grad = lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True)
        left -= set(axes)
    return lax.psum(grad, tuple(axis for axis in TOKEN_AXES if axis in left))


def holds_first(spec: PartitionSpec) -> jax.Array:
    """bool: whether this device is the first of those that hold the same shard."""
    others = unused_axes(spec)
    return lax.axis_index(others) == 0 if others else jnp.bool_(True)


def unused_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Axes over which devices hold the same shard."""
    return tuple(axis for axis in TOKEN_AXES if axis not in _axes_of(spec))


def _spread(name: str, spec: PartitionSpec) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Dimensions that only storage is spread along, and over which axes."""
    computed = weight_spec(name)
    for dim, axes in enumerate(spec):
        if axes and not (dim < len(computed) and computed[dim]):
            yield dim, _names(axes)


def _axes_of(spec: Iterable[Any]) -> set[str]:
    return {axis for axes in spec if axes for axis in _names(axes)}


def _names(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """A spec holds a single axis by its name alone."""
    return (axes,) if isinstance(axes, str) else tuple(axes)
