"""Model state <-> arrays by layer name, so that any stacking or stage split restores any other.

`layers.5.mla.w_o_HU_D` is that tensor of layer 5, counted from the first layer of the model,
whether it sits in a stack of dense or of MoE layers; `mtp.0.…` belongs to the first MTP module.
A `Blocked` weight is two arrays, `<name>.values` and `<name>.scales`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsv3_jax.checkpoint.boxes import Box, box_of
from dsv3_jax.checkpoint.parts import Parts, Piece
from dsv3_jax.parallel.mesh import STACKS
from dsv3_jax.quant.fp8 import Blocked, abstract_blocked


class StageNumbers(NamedTuple):
    """Of a pipeline stage: the first of its dense and of its MoE layers, counted from the first
    layer of the model, and the first of its MTP modules.
    """

    dense: int
    moe: int
    mtp: int


# The number of dense layers of a whole model; or of every stage, by which paths then begin.
Numbering = int | Sequence[StageNumbers]


def to_layers(state: nnx.State, numbering: Numbering) -> dict[str, np.ndarray]:
    """Host arrays by layer name; stacks come apart."""
    named = {}
    for path, variable in nnx.to_flat_state(state):
        for part, array in _parts(variable.get_value()).items():
            array = np.asarray(jax.device_get(array))
            names = layer_names(path, array.shape, numbering)
            if names:
                named |= {name + part: x for name, x in zip(names, array, strict=True)}
            else:
                named[_name(path, numbering) + part] = array
    return named


def to_pieces(
    state: nnx.State, numbering: Numbering, to_host: Callable[[jax.Array], np.ndarray]
) -> dict[str, list[Piece]]:
    """What `to_layers` returns, in the pieces that this process is the first holder of; every
    element of an array is in one process's. Of arrays alone, no `Blocked`.
    """
    named: defaultdict[str, list[Piece]] = defaultdict(list)
    for path, variable in nnx.to_flat_state(state):
        x = variable.get_value()
        names = layer_names(path, x.shape, numbering)
        for shard in x.addressable_shards:
            if shard.replica_id:
                continue
            array, (starts, _) = to_host(shard.data), box_of(shard.index, x.shape)
            if not names:
                named[_name(path, numbering)].append(Piece(x.shape, starts, array))
            for i, layer in enumerate(array if names else ()):
                named[names[starts[0] + i]].append(Piece(x.shape[1:], starts[1:], layer))
    return dict(named)


def boxes(like: nnx.State, numbering: Numbering) -> dict[str, list[Box]]:
    """What this process needs of every layer's array: `like` says where arrays lie."""
    wanted: defaultdict[str, list[Box]] = defaultdict(list)
    for path, variable in nnx.to_flat_state(like):
        held = variable.get_value()
        names = layer_names(path, held.shape, numbering)
        for index in held.sharding.addressable_devices_indices_map(held.shape).values():
            starts, shape = box_of(index, held.shape)
            if not names:
                wanted[_name(path, numbering)].append(Box(starts, shape))
            for name in names[starts[0] : starts[0] + shape[0]] if names else ():
                wanted[name].append(Box(starts[1:], shape[1:]))
    return dict(wanted)


def from_layers(
    like: nnx.State, named: MutableMapping[str, np.ndarray], numbering: Numbering
) -> nnx.State:
    """`like`'s structure and dtypes with the named values; FP8 is expanded where `like` has arrays.

    Each array is taken out of `named` when its turn comes, or all would be held twice.
    ValueError for missing, left-over or misshapen tensors; `named` is then whole.
    """
    _check_names(shapes(like, numbering), named)
    restored = {}
    for path, variable in nnx.to_flat_state(like):
        held = variable.get_value()
        names = layer_names(path, held.shape, numbering)
        layers = [_taken(held, name, named) for name in names or [_name(path, numbering)]]
        if isinstance(layers[0], Parts):
            value = _placed_parts(layers, held, stacked=bool(names))
        else:
            value = _stacked(layers) if names else layers[0]
            value = jax.tree.map(placed_like, value, held)
        restored[path] = variable.replace(value)
    return nnx.from_flat_state(restored)


def placed_like(x: Any, to: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """In the dtype and in the place of `to`, if it says one."""
    sharding = getattr(to, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.numpy.asarray(x, to.dtype)
    x = np.asarray(x, to.dtype)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)  # to each device its own shard
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _placed_parts(layers: list[Parts], held: jax.ShapeDtypeStruct, stacked: bool) -> jax.Array:
    """On each device of this process the box of an array that belongs there."""

    def box(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return layers[0][index].astype(held.dtype, copy=False)
        found = [layer[index[1:]] for layer in layers[index[0]]]
        return np.stack(found).astype(held.dtype, copy=False)

    return jax.make_array_from_callback(held.shape, held.sharding, box)


def shapes(like: nnx.State, numbering: Numbering) -> dict[str, tuple[int, ...]]:
    """What `to_layers` of a state, abstract or not, would hold."""
    hollow = jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), like)
    return {name: array.shape for name, array in to_layers(hollow, numbering).items()}


def as_stored(like: nnx.State, named: Mapping[str, Any], numbering: Numbering) -> nnx.State:
    """`like` with abstract values in the dtypes of `named`: a `Blocked` where that has FP8."""

    def changed(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        name = (layer_names(path, variable.shape, numbering) or [_name(path, numbering)])[0]
        if f"{name}.values" in named:
            return variable.replace(abstract_blocked(variable.shape))
        if name not in named:
            return variable
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, named[name].dtype))

    return nnx.map_state(changed, like)


def _name(path: tuple, numbering: Numbering) -> str:
    return ".".join(map(str, _in_the_model(path, numbering)[0]))


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


def layer_names(path: tuple, shape: tuple[int, ...], numbering: Numbering) -> list[str]:
    """A name for each layer of a stack of this shape; none where `path` is no stack's."""
    path, first = _in_the_model(path, numbering)
    if path[0] not in STACKS:
        return []
    return [".".join((f"layers.{first + i}", *map(str, path[1:]))) for i in range(shape[0])]


def _in_the_model(path: tuple, numbering: Numbering) -> tuple[tuple, int]:
    """A path as it is in the whole model, and the first layer of its stack, if it is a stack's."""
    if isinstance(numbering, int):
        numbers = StageNumbers(0, numbering, 0)
    else:
        numbers, path = numbering[path[0]], path[1:]
    if path[0] == "mtp":
        path = ("mtp", int(path[1]) + numbers.mtp, *path[2:])
    return path, numbers.moe if path[0] == "moe_layers" else numbers.dense


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
