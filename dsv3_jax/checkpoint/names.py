"""Model state <-> arrays by layer name, so that any stacking or stage split restores any other.

`layers.5.mla.w_o_HU_D` is that tensor of layer 5, counted from the first layer of the model,
whether it sits in a stack of dense or of MoE layers; `mtp.0.…` belongs to the first MTP module.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx


def to_layers(state: nnx.State, num_dense_layers: int) -> dict[str, np.ndarray]:
    """Host arrays by layer name; stacks come apart."""
    named = {}
    for path, variable in nnx.to_flat_state(state):
        array = np.asarray(jax.device_get(variable[...]))
        names = _layer_names(path, array.shape, num_dense_layers)
        if names:
            named |= zip(names, array, strict=True)
        else:
            named[".".join(map(str, path))] = array
    return named


def from_layers(
    like: nnx.State, named: Mapping[str, np.ndarray], num_dense_layers: int
) -> nnx.State:
    """`like`'s structure with the named values.

    ValueError for missing, left-over or misshapen tensors.
    """
    wanted = to_layers(
        jax.tree.map(lambda x: np.broadcast_to(np.int8(0), x.shape), like), num_dense_layers
    )
    _check_names(wanted, named)
    restored = {}
    for path, variable in nnx.to_flat_state(like):
        names = _layer_names(path, variable.shape, num_dense_layers)
        if names:
            value = np.stack([named[name] for name in names])
        else:
            value = named[".".join(map(str, path))]
        restored[path] = variable.replace(jax.numpy.asarray(value, variable.dtype))
    return nnx.from_flat_state(restored)


def _layer_names(path: tuple, shape: tuple[int, ...], num_dense_layers: int) -> list[str]:
    """A name for each layer of a stack; none where `path` is no stack's."""
    first = {"dense_layers": 0, "moe_layers": num_dense_layers}.get(path[0])
    if first is None:
        return []
    return [".".join((f"layers.{first + i}", *map(str, path[1:]))) for i in range(shape[0])]


def _check_names(wanted: Mapping[str, np.ndarray], named: Mapping[str, np.ndarray]) -> None:
    for problem, names in (
        ("lacks tensors of this model", set(wanted) - set(named)),
        ("holds tensors that this model has not", set(named) - set(wanted)),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"checkpoint {problem}, {len(names)} in all: {shown}")
    for name, array in wanted.items():
        if named[name].shape != array.shape:
            raise ValueError(
                f"checkpoint: {name} has shape {named[name].shape}; the model needs {array.shape}"
            )
