"""A run's state to and from a checkpoint: masters, moments and router biases by layer name, and
where the run stood (design: checkpoints).
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.names import from_layers, to_layers
from dsv3_jax.config import RunConfig
from dsv3_jax.train.optimizer import AdamState
from dsv3_jax.train.step import TrainState


class Position(NamedTuple):
    """Where a run stands: updates done and rows consumed. Data order, schedules and RNG follow
    from it and the seed.
    """

    step: int = 0
    consumed_rows: int = 0


def save(
    folder: Path, cfg: RunConfig, state: TrainState, position: Position, data: dict[str, str]
) -> Path:
    """Writes one checkpoint. `data` identifies tokenizer and documents."""
    dense = cfg.model.num_dense_layers
    adam = _adam(state)
    arrays = {
        "params": to_layers(state.params, dense),
        "router_bias": to_layers(state.biases, dense),
        "mu": to_layers(adam.mu, dense),
        "nu": to_layers(adam.nu, dense),
    }
    meta = {
        "config": json.loads(cfg.to_json()),
        "step": position.step,
        "consumed_rows": position.consumed_rows,
        "updates": int(adam.count),
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

    adam = _adam(state)
    moments = AdamState(
        jnp.asarray(checkpoint.meta["updates"], jnp.int32),
        part("mu", adam.mu),
        part("nu", adam.nu),
    )
    optimizer = jax.tree.map(
        lambda node: moments if isinstance(node, AdamState) else node,
        state.optimizer,
        is_leaf=lambda node: isinstance(node, AdamState),
    )
    restored = TrainState(
        part("params", state.params), part("router_bias", state.biases), optimizer
    )
    position = Position(checkpoint.meta["step"], checkpoint.meta["consumed_rows"])
    return restored, position


def _adam(state: TrainState) -> AdamState:
    found = [
        node
        for node in jax.tree.leaves(state.optimizer, is_leaf=lambda n: isinstance(n, AdamState))
        if isinstance(node, AdamState)
    ]
    assert len(found) == 1, f"{len(found)} Adam states in the optimiser"
    return found[0]
