"""The state of a run with a pipeline: a `TrainState` whose trees begin with stages' numbers, so
that whoever walks over arrays needs to know of no pipeline; taken apart, put together, and as the
state of one whole model.

A process has the stages of its own ranks. The number of updates is one for all stages.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from optax.tree_utils import tree_get, tree_set

from dsv3_jax.parallel.mesh import STACKS
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.step import TrainState


def by_stage(state: TrainState) -> dict[int, TrainState]:
    """Each stage's own."""
    moments = {name: tree_get(state.optimizer, name) for name in ("mu", "nu")}
    return {
        stage: TrainState(
            _child(state.params, stage),
            _child(state.biases, stage),
            tree_set(
                state.optimizer, **{name: _child(tree, stage) for name, tree in moments.items()}
            ),
        )
        for stage in _stages(state)
    }


def weights_by_stage(state: TrainState) -> dict[int, TrainState]:
    """Weights and router biases alone, of a state that may be without its optimiser's part."""
    return {
        stage: TrainState(_child(state.params, stage), _child(state.biases, stage), ())
        for stage in _stages(state)
    }


def _stages(state: TrainState) -> list[int]:
    return sorted({path[0] for path, _ in nnx.to_flat_state(state.params)})


def of_stages(states: Mapping[int, TrainState]) -> TrainState:
    """`by_stage` undone."""
    optimizers = {stage: state.optimizer for stage, state in states.items()}
    moments = {
        name: _joined({stage: tree_get(o, name) for stage, o in optimizers.items()})
        for name in ("mu", "nu")
    }
    return TrainState(
        _joined({stage: state.params for stage, state in states.items()}),
        _joined({stage: state.biases for stage, state in states.items()}),
        tree_set(next(iter(optimizers.values())), **moments),
    )


def _child(tree: nnx.State, stage: int) -> nnx.State:
    flat = nnx.to_flat_state(tree)
    return nnx.from_flat_state({path[1:]: x for path, x in flat if path[0] == stage})


def _joined(trees: Mapping[int, nnx.State]) -> nnx.State:
    return nnx.from_flat_state(
        {(stage, *path): x for stage, tree in trees.items() for path, x in nnx.to_flat_state(tree)}
    )


def placed_shapes(layout: Layout, stages: Sequence[int]) -> TrainState:
    """Shapes of these stages' state, which know where arrays lie."""
    return of_stages({s: layout.shardings[s].placed_shapes(layout.abstract(s)) for s in stages})


def from_whole(layout: Layout, state: TrainState) -> TrainState:
    """Each stage's part of a whole model's state, on its devices."""
    return of_stages({stage: _stage_of(layout, stage, state) for stage in layout.stage_numbers})


def _stage_of(layout: Layout, stage: int, whole: TrainState) -> TrainState:
    like = layout.abstract(stage)
    part = _of_trees(like, [whole], lambda like, found: _parted(layout, stage, like, found[0]))
    sharding = layout.shardings[stage]
    # Copies: stages are donated one by one, and would share what is on their device already.
    return jax.device_put(part, sharding.placements(sharding.state_specs(like)), may_alias=False)


def to_whole(layout: Layout, state: TrainState) -> TrainState:
    """The whole model's state on one device, from stages that are all in this process."""
    stages = list(by_stage(jax.device_get(state)).values())
    whole = _of_trees(layout.whole, stages, lambda like, found: joined(layout, like, found))
    return jax.tree.map(jnp.asarray, whole)


def _of_trees(like: TrainState, states: Sequence[TrainState], of: Callable) -> TrainState:
    """`of(like, trees)` for parameters, biases and both moments."""
    optimizers = [state.optimizer for state in states]
    moments = {
        name: of(tree_get(like.optimizer, name), [tree_get(o, name) for o in optimizers])
        for name in ("mu", "nu")
    }
    optimizer = tree_set(like.optimizer, count=tree_get(optimizers[0], "count"), **moments)
    return TrainState(
        of(like.params, [state.params for state in states]),
        of(like.biases, [state.biases for state in states]),
        optimizer,
    )


def _parted(layout: Layout, stage: int, like: nnx.State, whole: nnx.State) -> nnx.State:
    """A stage's part of a tree of the whole model."""
    held = dict(nnx.to_flat_state(whole))

    def of(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        if path[0] == "mtp":
            path = ("mtp", path[1] + layout.first_of(stage, "mtp"), *path[2:])
        x = held[path].get_value()
        if path[0] in STACKS:
            first = layout.first_of(stage, path[0])
            x = x[first : first + variable.shape[0]]
        return variable.replace(x)

    return nnx.map_state(of, like)


def joined(layout: Layout, like: nnx.State, parts: Sequence[Any]) -> nnx.State:
    """A tree of the whole model from every stage's."""
    held = [dict(nnx.to_flat_state(part)) for part in parts]

    def of(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        found = []
        for stage, arrays in enumerate(held):
            local = path
            if path[0] == "mtp":
                local = ("mtp", path[1] - layout.first_of(stage, "mtp"), *path[2:])
            if local in arrays:
                found.append(arrays[local].get_value())
        return variable.replace(jnp.concatenate(found) if path[0] in STACKS else found[0])

    return nnx.map_state(of, like)
