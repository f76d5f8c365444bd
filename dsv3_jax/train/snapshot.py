"""A run's state to and from a checkpoint.

Masters, moments and router biases go by layer name, beside them where the run stood.
"""

import json
from pathlib import Path
from typing import NamedTuple

import chex
import jax.numpy as jnp
from flax import nnx
from optax.tree_utils import tree_get, tree_set

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.names import from_layers, to_layers
from dsv3_jax.config import RunConfig
from dsv3_jax.train.step import TrainState


class Position(NamedTuple):
    """Where a run stands: updates done, rows consumed, seconds spent in training.

    Data order, schedules and random numbers follow from it and the seed.
    """

    step: int = 0
    consumed_rows: int = 0
    seconds: float = 0.0


def save(
    folder: Path, cfg: RunConfig, state: TrainState, position: Position, data: dict[str, str]
) -> Path:
    """Writes one checkpoint. `data` identifies tokenizer and documents."""
    dense = cfg.model.num_dense_layers
    arrays = {
        "params": to_layers(state.params, dense),
        "router_bias": to_layers(state.biases, dense),
        "mu": to_layers(tree_get(state.optimizer, "mu"), dense),
        "nu": to_layers(tree_get(state.optimizer, "nu"), dense),
    }
    meta = {
        "config": json.loads(cfg.to_json()),
        "step": position.step,
        "consumed_rows": position.consumed_rows,
        "seconds": position.seconds,
        "updates": int(tree_get(state.optimizer, "count")),
        "data": data,
    }
    return store.save(folder, position.step, arrays, meta)


def restore(
    checkpoint: store.Checkpoint, cfg: RunConfig, state: TrainState
) -> tuple[TrainState, Position]:
    """What `save` wrote, in the shape of a fresh `state`. ValueError if it does not fit."""
    dense = cfg.model.num_dense_layers

    def part(group: str, like: nnx.State) -> nnx.State:
        return from_layers(like, checkpoint.arrays[group], dense)

    optimizer = tree_set(
        state.optimizer,
        count=jnp.asarray(checkpoint.meta["updates"], jnp.int32),
        mu=part("mu", tree_get(state.optimizer, "mu")),
        nu=part("nu", tree_get(state.optimizer, "nu")),
    )
    restored = TrainState(
        part("params", state.params), part("router_bias", state.biases), optimizer
    )
    position = Position(*(checkpoint.meta[name] for name in Position._fields))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    return restored, position
