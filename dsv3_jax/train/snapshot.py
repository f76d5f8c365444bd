"""A run's state to and from a checkpoint.

Masters, moments and router biases go by layer name, beside them where the run stood.
"""

import json
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from flax import nnx
from optax.tree_utils import tree_get, tree_set

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.names import boxes, from_layers, placed_like, to_layers, to_pieces
from dsv3_jax.checkpoint.parts import Parts, Piece
from dsv3_jax.checkpoint.saver import Arrays
from dsv3_jax.config import RunConfig
from dsv3_jax.parallel import processes
from dsv3_jax.train.pipeline_cut import numbering_of
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.trouble import SpikeState


class Position(NamedTuple):
    """Where a run stands: steps done, rows consumed, seconds spent in training, updates skipped
    in all and since the last one that was made.

    Data order, schedules and random numbers follow from it and the seed.
    """

    step: int = 0
    consumed_rows: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Snapshot(NamedTuple):
    """All that a run goes on from."""

    state: TrainState
    position: Position
    average: nnx.State | None = None
    """Of the weights, if the run keeps one"""
    spike: SpikeState = SpikeState()
    load_LE: np.ndarray | None = None
    """Token copies per expert that no entry of the metrics has told yet"""
    feed: np.ndarray | None = None
    """What its feed goes on from, uint8, if that is not told by its position"""


def contents(
    cfg: RunConfig, snapshot: Snapshot, data: dict[str, str]
) -> tuple[Arrays, dict[str, Any]]:
    """A checkpoint's arrays and meta, for `store.save`; in several processes the pieces that this
    one owns, for `joint.save`. `data` identifies tokenizer and documents.

    The arrays share no memory with the state, which may be donated to the next step.
    """
    state, numbering = snapshot.state, numbering_of(cfg)

    def named(part: nnx.State) -> dict[str, np.ndarray] | dict[str, list[Piece]]:
        if processes.count() > 1:
            return to_pieces(part, numbering, lambda x: np.asarray(_apart(x)))
        return to_layers(jax.tree.map(_apart, part), numbering)

    arrays: dict[str, dict[str, Any]] = {
        "params": named(state.params),
        "router_bias": named(state.biases),
        "mu": named(tree_get(state.optimizer, "mu")),
        "nu": named(tree_get(state.optimizer, "nu")),
    }
    if snapshot.average is not None:
        arrays["average"] = named(snapshot.average)
    for group, name, x in (
        ("experts", "load_LE", snapshot.load_LE),
        ("feed", "state", snapshot.feed),
    ):
        if x is not None and processes.count() == 1:
            arrays[group] = {name: x}
        elif x is not None and processes.is_first():  # all have the same
            arrays[group] = {name: [Piece(x.shape, (0,) * x.ndim, x)]}
    meta = {
        "config": json.loads(cfg.to_json()),
        **snapshot.position._asdict(),
        "spike": snapshot.spike,
        "updates": int(tree_get(state.optimizer, "count")),
        "data": data,
    }
    return arrays, meta


def _apart(x: jax.Array) -> jax.Array:
    """An array whose host view is no view of `x`: where NumPy can see `x`'s own buffer, a copy.

    XLA:CPU does not reuse a buffer while NumPy looks at it: the next step would find new memory
    for the whole state. So a copy on its side costs no more than a view, and is no matter of luck.
    """
    platforms = {device.platform for device in x.devices()}
    if platforms.isdisjoint({"cpu"}) and x.sharding.memory_kind == "device":
        return x  # its host view is a copy
    return jax.device_put(x, x.sharding, may_alias=False)


def wanted(cfg: RunConfig, placed: TrainState) -> store.Wanted | None:
    """What this process has to read of a checkpoint for an abstract state that says where its
    arrays lie: None for all, which one process needs.
    """
    if processes.count() == 1:
        return None
    numbering = numbering_of(cfg)
    params = boxes(placed.params, numbering)
    likewise = dict.fromkeys(("params", "mu", "nu", "average"), params)
    return {**likewise, "router_bias": boxes(placed.biases, numbering)}


def restore(checkpoint: store.Checkpoint, cfg: RunConfig, state: TrainState) -> Snapshot:
    """What was taken apart, in the shape of `state`, which may be abstract. ValueError if it does
    not fit.

    The checkpoint's arrays are moved and `state`'s memory is given back.
    """
    numbering, state = numbering_of(cfg), _emptied(state)

    def part(group: str, like: nnx.State) -> nnx.State:
        return from_layers(like, checkpoint.arrays[group], numbering)

    optimizer = tree_set(
        state.optimizer,
        count=placed_like(checkpoint.meta["updates"], tree_get(state.optimizer, "count")),
        mu=part("mu", tree_get(state.optimizer, "mu")),
        nu=part("nu", tree_get(state.optimizer, "nu")),
    )
    restored = TrainState(
        part("params", state.params), part("router_bias", state.biases), optimizer
    )
    position = Position(*(checkpoint.meta[name] for name in Position._fields))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    average = part("average", state.params) if "average" in checkpoint.arrays else None
    spike = SpikeState(*checkpoint.meta["spike"])
    load_LE, feed = (_alone(checkpoint, *of) for of in (("experts", "load_LE"), ("feed", "state")))
    return Snapshot(restored, position, average, spike, load_LE, feed)


def _alone(checkpoint: store.Checkpoint, group: str, name: str) -> np.ndarray | None:
    """An array that all processes have whole, if the checkpoint has it."""
    found = checkpoint.arrays.get(group, {}).get(name)
    if isinstance(found, Parts):
        (found,) = found.boxes.values()
    return found


def weights_of(checkpoint: store.Checkpoint, cfg: RunConfig, state: TrainState) -> TrainState:
    """A fresh state with the checkpoint's weights and router biases. ValueError if they do not fit.

    With `cfg`'s number of dense layers; optimiser and position start anew. The checkpoint's arrays
    are moved and the memory of `state`'s weights is given back.
    """
    params, biases = _emptied((state.params, state.biases))
    found = weights_in(checkpoint, cfg, TrainState(params, biases, ()))
    return state._replace(params=found.params, biases=found.biases)


def weights_in(checkpoint: store.Checkpoint, cfg: RunConfig, like: TrainState) -> TrainState:
    """Weights and router biases alone, where an abstract state says. Else as `weights_of`."""
    numbering = numbering_of(cfg)
    return TrainState(
        from_layers(like.params, checkpoint.arrays["params"], numbering),
        from_layers(like.biases, checkpoint.arrays["router_bias"], numbering),
        (),
    )


def _emptied(tree: Any) -> Any:
    """Shapes, dtypes and places of arrays, whose memory is given back, or of abstract ones."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array):
            x.delete()
    return shapes
