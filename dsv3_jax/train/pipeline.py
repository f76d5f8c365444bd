"""A training step over the ranks of a pipeline (report 3.2.1): weights from masters, passes in the
schedule's order, gradients to their owners, one decision about the update, updates.

The step of one device, `train/step.py`, is its oracle: loss, every gradient, every weight.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from optax.tree_utils import tree_get, tree_set

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.model.router import max_violation
from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.parallel.neighbours import PER_DEVICE, Crossings, is_here
from dsv3_jax.parallel.orders import Item, Operation
from dsv3_jax.parallel.pipeline import Executed, Watch, execute
from dsv3_jax.parallel.schedules import Schedule, make
from dsv3_jax.plan.cuts import schedule_name
from dsv3_jax.train.loss import LossParts
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_programs import PassPrograms, compiling, kinds_of
from dsv3_jax.train.pipeline_rows import PipelineRows
from dsv3_jax.train.pipeline_state import by_stage, of_stages
from dsv3_jax.train.pipeline_watch import MEASURED_STEP, PipelineWatch
from dsv3_jax.train.rank_programs import Outcome, RankPrograms, Tally
from dsv3_jax.train.rank_step import RankStep
from dsv3_jax.train.sharding import WHOLE
from dsv3_jax.train.stage import Arrays, Numbers
from dsv3_jax.train.stage_programs import by_device, first_shard
from dsv3_jax.train.step import (
    UNOPTIMISED,
    Coefficients,
    StepMetrics,
    StepTraffic,
    TrainState,
    decide,
)


class Pipeline:
    """Of one run: the programs of the ranks that are in this process, and its step."""

    def __init__(
        self, cfg: RunConfig, layout: Layout, options: Mapping[str, Any] | None = None
    ) -> None:
        """`options` of the compiler."""
        self.cfg, self.layout = cfg, layout
        self.rows = cfg.train.rows // cfg.train.microbatches
        self.crossings = Crossings(layout.meshes)
        self.steps = 0
        self.watch: PipelineWatch | None = None  # of the newest step
        self.measured: PipelineWatch | None = None  # until somebody takes it
        self.rows_placed = PipelineRows(layout.meshes, self.rows, cfg.mesh.row_shards)
        self.here = [rank for rank, mesh in enumerate(layout.meshes) if is_here(mesh)]
        self.ranks = {rank: RankPrograms(layout, rank, self.rows, options) for rank in self.here}
        self.stages = [stage for programs in self.ranks.values() for stage in programs.owned]
        self._loans = {
            (rank, borrower): (tuple(keys), tuple(layout.borrowed_stages(borrower).get(rank, ())))
            for borrower in range(layout.ranks)
            for rank, keys in layout.borrowed(borrower).items()
        }
        self.passes = {rank: PassPrograms(programs) for rank, programs in self.ranks.items()}
        self._schedules: dict[int, Schedule] = {}

    # --- state -----------------------------------------------------------------------------------

    def init_state(self) -> TrainState:
        """A fresh model and optimiser from `train.seed`, each stage on the devices that own it, as
        `pipeline_state.by_stage` takes it apart.
        """
        key = jax.random.key(self.cfg.train.seed)
        return of_stages({stage: self._fresh(stage, key) for stage in self.stages})

    def _fresh(self, stage: int, key: jax.Array) -> TrainState:
        held, layout = self.layout.stages[stage], self.layout
        sharding, shapes = layout.shardings[stage], layout.abstract(stage)

        def build(key: jax.Array) -> TrainState:
            params, biases = held.drawn(key)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.optimizer)
            return TrainState(layout.part(params, stage), biases, zeros)

        places = sharding.placements(sharding.state_specs(shapes))
        return jax.jit(build, compiler_options=UNOPTIMISED, out_shardings=places)(key)

    # --- a step ----------------------------------------------------------------------------------

    def step(
        self,
        state: TrainState,
        batch: Batch,
        coefficients: Coefficients,
    ) -> tuple[TrainState, StepMetrics]:
        """One update; `batch` has on the host this process's `own_rows`. The state is donated."""
        states = by_stage(state)
        steps, schedule = self.begin(states, batch, coefficients.mtp_weight)
        self.steps += 1
        measure = self.steps == MEASURED_STEP
        self.watch = PipelineWatch(schedule, measure=measure)
        self.walk(schedule, steps, self._noting(steps))
        if measure:
            self.measured = self.watch
        grads, tallies = self.reduce(steps)
        tally = self.crossings.summed(tallies, self._like_tally)
        rows = self._rows_told(steps, schedule.microbatches)
        outcomes = {}
        for rank, programs in self.ranks.items():
            parts = []
            for stage in programs.owned:
                update, given = self._updates[stage], self._everywhere(rank, coefficients)
                before = self._counted(rank, states[stage])
                states[stage], outcome = update(before, grads[rank], tally[rank], given)
                parts.append(outcome)
            outcomes[rank] = parts[0] if len(parts) == 1 else jax.tree.map(jnp.add, *parts)
        outcome = self.crossings.summed(outcomes, self._like_outcome)
        first = self.here[0]
        metrics = self._metrics(
            *(jax.tree.map(first_shard, x[first]) for x in (tally, outcome, rows)), coefficients
        )
        return of_stages(states), metrics

    def _noting(self, steps: Mapping[int, RankStep]) -> Watch:
        """The watch, with all that an operation gives: W has no output but its sums, nor has the
        last stage's F or the first one's B.
        """
        watch = self.watch

        def note(rank: int, item: Item, result: Any) -> None:
            watch(rank, item, (result, steps[rank].sums) if isinstance(item, Operation) else result)

        return note

    def _counted(self, rank: int, state: TrainState) -> TrainState:
        """With the number of updates, which stages have in common, where this rank can use it."""
        count = self._everywhere(rank, tree_get(state.optimizer, "count"), copied=True)
        return state._replace(optimizer=tree_set(state.optimizer, count=count))

    def begin(
        self, states: Mapping[int, TrainState], batch: Batch, mtp_weight: jax.Array
    ) -> tuple[dict[int, RankStep], Schedule]:
        """Every rank ready for its passes, and their order."""
        count = self.rows_placed.count(len(batch.labels_BT))
        schedule = self.schedule_of(count)
        self.compile(schedule)
        prepared = self.prepare(states)
        steps = {}
        for rank, programs in self.ranks.items():
            micro = [self.rows_placed.microbatch(rank, batch, m, count) for m in range(count)]
            weights, biases = prepared[rank]
            sums, told = programs.zeros(weights)
            devices = programs.sharding.token_shards
            share = np.asarray(1 / (count * devices), self.layout.high)
            valid = self._valid(rank, [part.labels_BT for part in micro])
            numbers = Numbers(valid, *self._everywhere(rank, (mtp_weight, share)))
            steps[rank] = RankStep(
                programs,
                self.passes[rank],
                programs.of_chunks(weights),
                {chunk: biases[stage] for chunk, stage in programs.stages.items()},
                micro,
                numbers,
                sums,
                told,
                {},
            )
        return steps, schedule

    def walk(
        self, schedule: Schedule, steps: dict[int, RankStep], watch: Watch | None = None
    ) -> Executed:
        """The passes of a step."""
        message = next(iter(self.ranks.values())).chunks[0].message
        like = {True: jax.ShapeDtypeStruct(message.shape, message.dtype), False: None}

        def swap(left: int, right: Any, leftward: Any, ways: tuple[bool, bool]) -> tuple:
            return self.crossings.swap(left, right, leftward, tuple(like[way] for way in ways))

        return execute(schedule, steps, swap, watch)

    def reduce(self, steps: dict[int, RankStep]) -> tuple[dict[int, Arrays], dict[int, Tally]]:
        """Sums over devices and over ranks that hold a parameter, at its owner; and tallies."""
        grads = {rank: step.programs.reduce(step.sums) for rank, step in steps.items()}
        arrived: dict[int, list[Arrays]] = {rank: [] for rank in self.ranks}
        for (owner, borrower), (keys, _) in self._loans.items():
            some = {key: grads[borrower].pop(key) for key in keys} if borrower in grads else None
            mesh = self.layout.meshes[owner]
            like = {key: self.layout.shard(key, mesh, self.layout.high) for key in keys}
            found = self.crossings.send(borrower, owner, some, like)
            if owner in arrived:
                arrived[owner].append(found)
        tallies = {}
        for rank, step in steps.items():
            programs = step.programs
            grads[rank], tallies[rank] = programs.tally(step.told, grads[rank], arrived[rank])
        return grads, tallies

    # --- parts of it -----------------------------------------------------------------------------

    def prepare(
        self, states: Mapping[int, TrainState]
    ) -> dict[int, tuple[Arrays, dict[int, nnx.State]]]:
        """Of every rank here, the weights that a step computes with, by key, and its stages'
        router biases.
        """
        borrowed, prepared = self._borrowed(states), {}
        for rank, programs in self.ranks.items():
            biases = {stage: states[stage].biases for stage in programs.owned}
            prepared[rank] = programs.prepare((programs.masters(states), biases), borrowed[rank])
        return prepared

    def _borrowed(
        self, states: Mapping[int, TrainState]
    ) -> dict[int, tuple[Arrays, dict[int, nnx.State]]]:
        """What each rank gets of others' masters and router biases, by device."""
        found: dict[int, tuple] = {rank: ({}, {}) for rank in self.ranks}
        for (owner, borrower), (keys, stages) in self._loans.items():
            lent = self.lent(owner, keys, stages, states)
            like = self.layout.by_device(keys, stages, self.layout.meshes[borrower])
            got = self.crossings.send(owner, borrower, lent, like)
            if borrower in found:
                for mine, new in zip(found[borrower], got, strict=True):
                    mine |= new
        return found

    def _everywhere(self, rank: int, tree: Any, *, copied: bool = False) -> Any:
        """Scalars on all devices of a rank; `copied` if they will be donated."""
        place = NamedSharding(self.layout.meshes[rank], WHOLE)
        if self.rows_placed.is_alone:
            return jax.device_put(tree, place, may_alias=False if copied else None)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback((), place, lambda _: np.asarray(x)), tree
        )

    def schedule_of(self, microbatches: int) -> Schedule:
        """Of a step of so many; known ones are kept, since transfers are placed by a simulation."""
        if microbatches not in self._schedules:
            name = schedule_name(self.cfg, microbatches)
            self._schedules[microbatches] = make(name, self.layout.ranks, microbatches)
        return self._schedules[microbatches]

    def compile(self, schedule: Schedule) -> None:
        """Begins with all passes that a schedule has on the ranks here, as far as they are new; who
        needs one waits for it.
        """
        threads = compiling()
        for rank, passes in self.passes.items():
            passes.begin(kinds_of(schedule.operations(rank)), threads)
        threads.shutdown(wait=False)

    def _valid(self, rank: int, labels: Sequence[jax.Array]) -> jax.Array:
        """Labels of the whole step that count, at least 1."""
        return self._counts[rank](list(labels))

    @cached_property
    def _counts(self) -> dict[int, Callable]:
        def body(labels: list[jax.Array]) -> jax.Array:
            found = sum((x >= 0).sum(dtype=jnp.int32) for x in labels)
            return jnp.maximum(lax.psum(found, TOKEN_AXES), 1)

        return {
            rank: jax.jit(programs.sharding.per_device(body, (PER_DEVICE,), WHOLE))
            for rank, programs in self.ranks.items()
        }

    @cached_property
    def _updates(self) -> dict[int, Callable]:
        return {
            stage: programs.update(stage)
            for programs in self.ranks.values()
            for stage in programs.owned
        }

    def lent(
        self,
        rank: int,
        keys: tuple[str, ...],
        stages: tuple[int, ...],
        states: Mapping[int, TrainState],
    ) -> tuple[Arrays, dict[int, nnx.State]] | None:
        """Some of a rank's masters and router biases by device, if it is here."""
        if rank not in self.ranks:
            return None
        programs, known = self.ranks[rank], (rank, keys, stages)
        if known not in self._lends:
            self._lends[known] = programs.lend(keys, stages)
        masters = programs.masters(states)
        biases = {stage: states[stage].biases for stage in stages}
        return self._lends[known]({key: masters[key] for key in keys}, biases)

    @cached_property
    def _lends(self) -> dict[Any, Callable]:
        return {}

    def _rows_told(self, steps: dict[int, RankStep], count: int) -> dict[int, jax.Array]:
        """On every rank, of every row whether its gradient is finite."""
        found = {}
        for rank, step in steps.items():
            if step.row_is_finite:
                found[rank] = self._bad_rows(rank, tuple(sorted(step.row_is_finite)), count)(
                    [step.row_is_finite[m] for m in sorted(step.row_is_finite)]
                )
        devices = self.cfg.mesh.token_shards
        like = jax.ShapeDtypeStruct((devices, count * self.rows), jnp.int32)
        return self.crossings.summed(found, like)

    def _bad_rows(self, rank: int, which: tuple[int, ...], count: int) -> Callable:
        key, shared = (rank, which, count), self.cfg.mesh.row_axes
        groups = tuple(axis for axis in TOKEN_AXES if axis not in shared)
        if key not in self._bad_row_programs:

            def body(flags: list[jax.Array]) -> jax.Array:
                own_Mb = jnp.zeros((count, len(flags[0])), jnp.int32)
                own_Mb = own_Mb.at[jnp.asarray(which)].set(1 - jnp.stack(flags).astype(jnp.int32))
                own_Mb = lax.psum(own_Mb, shared) if shared else own_Mb
                return by_device(lax.all_gather(own_Mb.reshape(-1), groups, tiled=True))

            f = self.ranks[rank].sharding.per_device(body, (PER_DEVICE,), PER_DEVICE)
            self._bad_row_programs[key] = jax.jit(f)
        return self._bad_row_programs[key]

    @cached_property
    def _bad_row_programs(self) -> dict[Any, Callable]:
        return {}

    # --- what is told ----------------------------------------------------------------------------

    @cached_property
    def _metrics(self) -> Callable:
        layout = self.layout

        def metrics(tally: Tally, outcome: Outcome, bad_B: jax.Array, coefficients: Coefficients):
            tally, outcome, bad_B = jax.tree.map(lambda x: x[0], (tally, outcome, bad_B))
            squares = layout.squares_state(tally.squares)
            decided = decide(tally.losses[0], tally.losses[1], squares, coefficients)
            traffic = None
            if tally.traffic:
                traffic = StepTraffic(tally.traffic, tally.most_received_L, tally.most_rounds_L)
            return StepMetrics(
                tally.losses[0],
                LossParts(*tally.losses[1:], tally.load_LE),
                decided.norm,
                decided.norms,
                decided.applied,
                outcome.not_finite == 0,
                bad_B == 0,
                max_violation(tally.load_LE),
                outcome.bias_LE,
                outcome.bias_moved_L > 0,
                squares,
                traffic,
            )

        return jax.jit(metrics)

    @cached_property
    def _likes(self) -> tuple[Any, Any]:
        model, devices = self.cfg.model, self.cfg.mesh.token_shards
        layout = self.layout
        high = self.layout.high

        def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((devices, *shape), dtype)

        routers = model.num_moe_layers + model.mtp_depth
        load, per_router = of(routers, model.num_experts), of(routers)
        traffic = None
        if layout.shardings[0].plan:
            traffic = Traffic(*[per_router] * len(Traffic._fields))
        tally = Tally(
            of(4, dtype=high),
            load,
            traffic,
            per_router,
            per_router,
            of(layout.num_squares, dtype=high),
        )
        outcome = Outcome(of(), of(routers, model.num_experts, dtype=high), per_router)
        return tally, outcome

    @property
    def _like_tally(self) -> Tally:
        return self._likes[0]

    @property
    def _like_outcome(self) -> Outcome:
        return self._likes[1]
