"""What a pipeline rank does around a step's passes: weights made from masters, gradients reduced,
updates (report 3.2.1, 3.2.3).

Each function is one program on the rank's devices. Trees go by key, arrays by device.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.mesh import parameter_name
from dsv3_jax.parallel.neighbours import PER_DEVICE
from dsv3_jax.parallel.zero import gathered, summed_and_scattered, unused_axes
from dsv3_jax.train.pipeline_layout import Layout, key_of
from dsv3_jax.train.sharding import WHOLE, RunSharding
from dsv3_jax.train.stage import Arrays
from dsv3_jax.train.stage_programs import StagePrograms, Told, by_device, own
from dsv3_jax.train.step import (
    Coefficients,
    TrainState,
    all_finite,
    decide,
    squared_norms,
    stacked_biases,
    updated,
)


class Tally(NamedTuple):
    """What a rank knows of a step; summed over ranks it is the whole step's."""

    losses: jax.Array
    """Total, main, MTP, balance"""
    load_LE: jax.Array
    traffic: Traffic | None
    most_received_L: jax.Array
    most_rounds_L: jax.Array
    squares: jax.Array
    """`Layout.squares` of the gradient"""


class Outcome(NamedTuple):
    """What a rank knows of its state after an update; summed over ranks, of all."""

    not_finite: jax.Array
    bias_LE: jax.Array
    bias_moved_L: jax.Array


class RankPrograms:
    """Of one rank."""

    def __init__(
        self, layout: Layout, rank: int, rows: int, options: Mapping[str, Any] | None = None
    ) -> None:
        """`rows` of a micro-batch, all devices together; `options` of the compiler."""
        self.options = options
        self.layout, self.rank, self.cfg = layout, rank, layout.cfg
        self.mesh = layout.meshes[rank]
        self.stages = layout.chunks(rank)
        self.keys = layout.on_rank(rank)
        plan = layout.shardings[0].plan
        self.sharding = RunSharding(self.mesh, plan, {})
        self.chunks = {
            chunk: StagePrograms(
                layout.stages[stage], self.sharding, layout.keys[stage], rows, options
            )
            for chunk, stage in self.stages.items()
        }
        self.owned = [stage for stage in self.stages.values() if layout.rank_of(stage) == rank]

    def _program(self, body: Callable, specs: Any, out: Any, donated: tuple = ()) -> Callable:
        f = self.sharding.per_device(body, specs, out)
        return jax.jit(f, donate_argnums=donated, compiler_options=self.options)

    def spec(self, key: str) -> Any:
        """How the key's master lies."""
        stage, name = self.keys[key]
        return self.layout.shardings[stage].specs[name]

    # --- before a step's passes ------------------------------------------------------------------

    @property
    def mine(self) -> tuple[Arrays, dict[int, nnx.State]]:
        """Shapes of what `prepare` takes of the rank's own."""
        masters, biases = {}, {}
        for stage in self.owned:
            sharding = self.layout.shardings[stage]
            state = sharding.placed_shapes(self.layout.abstract(stage))
            biases[stage] = state.biases
            for path, x in jax.tree_util.tree_leaves_with_path(state.params):
                masters[key_of(stage, parameter_name(path))] = x
        return masters, biases

    @property
    def others(self) -> tuple[Arrays, dict[int, nnx.State]]:
        """Shapes of what it takes of other ranks'."""
        borrowed = [key for keys in self.layout.borrowed(self.rank).values() for key in keys]
        stages = [s for own in self.layout.borrowed_stages(self.rank).values() for s in own]
        return self.layout.by_device(borrowed, stages, self.mesh)

    def of_chunks(self, weights: Arrays) -> dict[int, Arrays]:
        """By chunk and name, of weights by key."""
        keys = self.layout.keys
        return {
            chunk: {name: weights[key] for name, key in keys[stage].items()}
            for chunk, stage in self.stages.items()
        }

    def masters(self, states: Mapping[int, TrainState]) -> Arrays:
        """Of owned stages, by key."""
        found = {}
        for stage in self.owned:
            for path, x in jax.tree_util.tree_leaves_with_path(states[stage].params):
                found[key_of(stage, parameter_name(path))] = x
        return found

    def lend(self, keys: tuple[str, ...], stages: tuple[int, ...]) -> Callable:
        """(masters, router biases of stages) as they lie -> the same by device, to be sent."""
        specs = {key: self.spec(key) for key in keys}, dict.fromkeys(stages, WHOLE)
        return self._program(lambda *lent: by_device(lent), specs, PER_DEVICE)

    @cached_property
    def prepare(self) -> Callable:
        """(own masters and biases, borrowed ones by device) -> weights of the rank, by key, and
        biases of its stages.
        """

        def body(mine: tuple, borrowed: tuple) -> tuple[Arrays, dict[int, nnx.State]]:
            (masters, biases), (others, biases_there) = mine, own(borrowed)
            weights = {}
            for key, x in {**masters, **others}.items():
                stage, name = self.keys[key]
                master = gathered(x, name, self.spec(key))
                weights[key] = self.layout.stages[stage].computed(name, master)
            return by_device((weights, {**biases, **biases_there}))

        specs = {key: self.spec(key) for key, (s, _) in self.keys.items() if s in self.owned}
        mine = specs, dict.fromkeys(self.owned, WHOLE)
        return self._program(body, (mine, PER_DEVICE), PER_DEVICE)

    @cached_property
    def zeros(self) -> Callable:
        """Weights -> the sums of their gradients, and of what stages tell, before the first."""

        def body(weights: Arrays) -> tuple[Arrays, dict[int, Told]]:
            sums = {}
            for key, (stage, name) in self.keys.items():
                sums[key] = self.layout.stages[stage].zeros(name, own(weights[key]))
            told = {
                chunk: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), programs.told)
                for chunk, programs in self.chunks.items()
            }
            return by_device(sums), by_device(told)

        return self._program(body, (PER_DEVICE,), PER_DEVICE)

    # --- behind them -----------------------------------------------------------------------------

    @cached_property
    def reduce(self) -> Callable:
        """Each device's sums -> the gradient of the masters' shards, of all devices."""

        def body(sums: Arrays) -> Arrays:
            grads = {}
            for key, x in own(sums).items():
                grads[key] = summed_and_scattered(x, self.keys[key][1], self.spec(key))
            return by_device(grads)

        return self._program(body, (PER_DEVICE,), PER_DEVICE)

    @cached_property
    def tally(self) -> Callable:
        """(what stages have told, gradients of owned keys, and the same from other ranks)
        -> gradients, tally.
        """

        def body(told: dict[int, Told], grads: Arrays, arrived: list[Arrays]):
            grads = dict(grads)
            for others in arrived:
                for key, x in others.items():
                    grads[key] = grads[key] + x
            return grads, by_device(self._tally(own(told), own(grads)))

        return self._program(body, (PER_DEVICE,) * 3, PER_DEVICE)

    def _tally(self, told: dict[int, Told], grads: Arrays) -> Tally:
        layout, model = self.layout, self.cfg.model
        routers = model.num_moe_layers + model.mtp_depth
        high = self.layout.high
        load_LE = jnp.zeros((routers, model.num_experts), jnp.int32)
        zero_L, losses = jnp.zeros(routers, jnp.int32), jnp.zeros(4, high)
        traffic = Traffic(*[zero_L] * len(Traffic._fields)) if self.sharding.plan else None
        received_L = rounds_L = zero_L
        for chunk, stage in self.stages.items():
            rows = jnp.asarray(layout.router_rows(stage), jnp.int32)
            found = told[chunk]
            losses += self.sharding.sum(found.losses)
            if not len(rows):
                continue
            load_LE = load_LE.at[rows].add(self.sharding.sum(found.load_LE))
            if traffic:
                total = self.sharding.sum(found.traffic)
                traffic = jax.tree.map(lambda x, y, rows=rows: x.at[rows].add(y), traffic, total)
                most = self.sharding.max((found.traffic.received, found.traffic.rounds))
                received_L = received_L.at[rows].add(most[0])
                rounds_L = rounds_L.at[rows].add(most[1])
        squares = jnp.zeros(layout.num_squares, high)
        for stage in self.owned:
            state = layout.state_of(stage, grads)
            parts = layout.shardings[stage].sum_of_shards(squared_norms(state))
            flat = [jnp.atleast_1d(x) for x in jax.tree.leaves(parts)]
            squares = squares.at[layout.square_places(stage)].set(jnp.concatenate(flat))
        return Tally(losses, load_LE, traffic, received_L, rounds_L, squares)

    def update(self, stage: int) -> Callable:
        """(state, gradients of the rank's keys, the step's tally, coefficients) -> state, outcome.

        The state is donated.
        """
        layout = self.layout
        rows = jnp.asarray(layout.router_rows(stage), jnp.int32)

        def body(state: TrainState, grads: Arrays, tally: Tally, coefficients: Coefficients):
            tally = jax.tree.map(lambda x: _alike(x, WHOLE), own(tally))
            squares = layout.squares_state(tally.squares)
            decided = decide(tally.losses[0], tally.losses[1], squares, coefficients)
            load_LE = tally.load_LE[rows]
            grads = jax.tree.map(_alike, layout.state_of(stage, own(grads)), specs.params)
            after = updated(self.cfg, state, grads, load_LE, decided, coefficients)
            bad = self.sharding.sum((~all_finite(after.params)).astype(jnp.int32))
            bias_LE = jnp.zeros(tally.load_LE.shape, self.layout.high)
            moved_L = jnp.zeros(len(bias_LE), jnp.int32)
            if len(rows):
                now_LE, before_LE = stacked_biases(after.biases), stacked_biases(state.biases)
                bias_LE = bias_LE.at[rows].set(now_LE)
                moved_L = moved_L.at[rows].set((now_LE != before_LE).any(-1).astype(jnp.int32))
            return after, by_device(Outcome(bad, bias_LE, moved_L))

        specs = layout.shardings[stage].state_specs(layout.abstract(stage))
        arguments = specs, PER_DEVICE, PER_DEVICE, WHOLE
        return self._program(body, arguments, (specs, PER_DEVICE), (0,))


def _alike(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """What is the same on devices that a spec tells no difference of, typed as such."""
    axes = unused_axes(spec)  # none of an expert's master in data groups
    return lax.pmax(x, axes) if axes else x
