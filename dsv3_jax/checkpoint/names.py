"""Model state <-> arrays by layer name, so that any stacking or stage split restores any other.

`layers.5.mla.w_o_HU_D` is that tensor of layer 5, counted from the first layer of the model,
whether it sits in a stack of dense or of MoE layers; `mtp.0.…` belongs to the first MTP module.
A `Blocked` weight is two arrays, `<name>.values` and `<name>.scales`.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsv3_jax.parallel.mesh import STACKS
from dsv3_jax.quant.fp8 import Blocked, abstract_blocked


def to_layers(state: nnx.State, num_dense_layers: int) -> dict[str, np.ndarray]:
    """Host arrays by layer name; stacks come apart."""
    named = {}
    for path, variable in nnx.to_flat_state(state):
        for part, array in _parts(variable.get_value()).items():
            array = np.asarray(jax.device_get(array))
            names = layer_names(path, array.shape, num_dense_layers)
            if names:
                named |= {name + part: x for name, x in zip(names, array, strict=True)}
            else:
                named[_name(path) + part] = array
    return named


def from_layers(
    like: nnx.State, named: MutableMapping[str, np.ndarray], num_dense_layers: int
) -> nnx.State:
    """`like`'s structure and dtypes with the named values; FP8 is expanded where `like` has arrays.

    Each array is taken out of `named` when its turn comes, or all would be held twice.
    ValueError for missing, left-over or misshapen tensors; `named` is then whole.
    """
    _check_names(shapes(like, num_dense_layers), named)
    restored = {}
    for path, variable in nnx.to_flat_state(like):
        held = variable.get_value()
        names = layer_names(path, held.shape, num_dense_layers)
        if names:
            value = _stacked([_taken(held, name, named) for name in names])
        else:
            value = _taken(held, _name(path), named)
        value = jax.tree.map(placed_like, value, held)
        restored[path] = variable.replace(value)
    return nnx.from_flat_state(restored)


def placed_like(x: Any, to: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """In the dtype and in the place of `to`, if it says one."""
    sharding = getattr(to, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.numpy.asarray(x, to.dtype)
    return jax.device_put(np.asarray(x, to.dtype), sharding)  # to each device its own shard


def shapes(like: nnx.State, num_dense_layers: int) -> dict[str, tuple[int, ...]]:
    """What `to_layers` of a state, abstract or not, would hold."""
    hollow = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), like)
    return {name: array.shape for name, array in to_layers(hollow, num_dense_layers).items()}


def as_stored(like: nnx.State, named: Mapping[str, Any], num_dense_layers: int) -> nnx.State:
    """`like` with abstract values in the dtypes of `named`: a `Blocked` where that has FP8."""

    def changed(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = (layer_names(path, variable.shape, num_dense_layers) or [_name(path)])[0]
        if f"{name}.values" in named:
            return variable.replace(abstract_blocked(variable.shape))
        if name not in named:
            return variable
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, named[name].dtype))

    return nnx.map_state(changed, like)


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _parts(value: jax.Array | Blocked) -> dict[str, jax.Array]:
    """What is added to a name -> array."""
    if isinstance(value, Blocked):
        return {".values": value.values, ".scales": value.scales}
    return {"": value}


def _stacked(layers: list[np.ndarray | Blocked]) -> np.ndarray | Blocked:
    return jax.tree.map(lambda *x: np.stack(x), *layers)


def _taken(
    held: jax.Array | Blocked, name: str, named: MutableMapping[str, np.ndarray]
) -> np.ndarray | Blocked:
    """A named weight, no longer in `named`; in FP8 only if `held` is."""
    if name in named:
        return named.pop(name)
    blocked = Blocked(named.pop(f"{name}.values"), named.pop(f"{name}.scales"))
    return blocked if isinstance(held, Blocked) else np.asarray(_expanded(blocked))


@jax.jit
def _expanded(blocked: Blocked) -> jax.Array:
    return blocked.dequantize()


def layer_names(path: tuple, shape: tuple[int, ...], num_dense_layers: int) -> list[str]:
    """A name for each layer of a stack of this shape; none where `path` is no stack's."""
    if path[0] not in STACKS:
        return []
    first = num_dense_layers if path[0] == "moe_layers" else 0
    return [".".join((f"layers.{first + i}", *map(str, path[1:]))) for i in range(shape[0])]


def _check_names(wanted: Mapping[str, tuple[int, ...]], named: Mapping[str, np.ndarray]) -> None:
    # A weight that is wanted as an array may be there in FP8.
    source = {n: n if n in named else f"{n}.values" for n in wanted}
    used = {*source.values(), *(f"{n}.scales" for n, s in source.items() if s != n)}
    for problem, names in (
        ("lacks tensors of this model", {n for n, s in source.items() if s not in named}),
        ("holds tensors that this model has not", set(named) - used),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"checkpoint {problem}, {len(names)} in all: {shown}")
    for name, shape in wanted.items():
        found = named[source[name]].shape
        if found != shape:
            raise ValueError(f"checkpoint: {name} has shape {found}; the model needs {shape}")
