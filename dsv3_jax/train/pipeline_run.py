"""What a training loop asks of a pipeline, as `programs.py` and `sharding.py` answer it for a run
without one: steps for so many rows, rows, weights on one device, validation.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.neighbours import PER_DEVICE
from dsv3_jax.parallel.schedules import Schedule
from dsv3_jax.plan.cuts import cuts_of
from dsv3_jax.train.pipeline import Pipeline
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_state import joined, placed_shapes, weights_by_stage
from dsv3_jax.train.scoring import Scores, scoring
from dsv3_jax.train.sharding import RunSharding
from dsv3_jax.train.stage_programs import StagePrograms, by_device, first_shard, own
from dsv3_jax.train.step import TrainState
from dsv3_jax.train.validation import Validate, validating


class PipelineRun:
    """Of one run."""

    def __init__(self, cfg: RunConfig) -> None:
        """ValueError if devices are lacking."""
        self.cfg, self.mesh = cfg, make_mesh(cfg.mesh)
        self.layout = Layout(cfg, self.mesh, cuts_of(cfg))
        self.pipeline = Pipeline(cfg, self.layout)
        self.shapes = placed_shapes(self.layout, self.pipeline.stages)
        self._known: set[int] = set()

    # --- as StepPrograms -------------------------------------------------------------------------

    @property
    def sharding(self) -> "PipelineRun":
        """Where things lie."""
        return self

    def begin(self, rows: int) -> None:
        """Has compiled what a step of so many rows takes."""
        if rows not in self._known:
            self._known.add(rows)
            self.pipeline.compile(self.pipeline.schedule_of(rows // self.pipeline.rows))

    def __contains__(self, rows: int) -> bool:
        """Whether asking for the step of so many rows takes no time."""
        return rows in self._known and all(p.is_ready for p in self.pipeline.passes.values())

    def of(self, rows: int) -> Callable:
        """`step(state, batch, coefficients)` for so many rows; waits until it is compiled."""
        self.begin(rows)
        for passes in self.pipeline.passes.values():
            passes.wait()
        return self.pipeline.step

    def where(self) -> str:
        """What the devices are at, from any thread."""
        watch = self.pipeline.watch
        return watch.where() if watch else "before the passes"

    def measured(self) -> tuple[Schedule, dict] | None:
        """Once, of the step whose operations were measured: its schedule, and medians in seconds.
        Of a step in flight, too: the next one may have been handed over already.
        """
        watch, self.pipeline.measured = self.pipeline.measured, None
        return (watch.schedule, watch.seconds()) if watch else None

    def init_state(self) -> TrainState:
        """A fresh one from the run's seed."""
        return self.pipeline.init_state()

    # --- as RunSharding --------------------------------------------------------------------------

    def own_rows(self, rows: int) -> Sequence[int]:
        """Which of a batch's rows lie on devices of this process, in order."""
        return self.pipeline.rows_placed.own_rows(rows)

    def put_rows(self, batch: Batch, rows: int | None = None) -> Batch:
        """As it is: a step puts every micro-batch on its ranks."""
        del rows
        return batch

    def on_one_device(self, state: TrainState) -> TrainState | None:
        """Weights and biases of the whole model on the first device; None in other processes than
        its own. All processes must ask.
        """
        found: dict[str, Any] = {}
        biases: dict[int, nnx.State] = {}
        stages = weights_by_stage(state)
        pipeline, layout = self.pipeline, self.layout
        for rank in range(layout.ranks):
            owned = tuple(s for s in layout.stage_numbers if layout.rank_of(s) == rank)
            keys = tuple(sorted(layout.keys[s][name] for s in owned for name in layout.owned(s)))
            lent = pipeline.lent(rank, keys, owned, stages)
            if rank:
                like = layout.by_device(keys, owned, layout.meshes[0])
                lent = pipeline.crossings.send(rank, 0, lent, like)
            if 0 in pipeline.ranks:
                found |= lent[0]
                biases |= lent[1]
        if 0 not in pipeline.ranks:
            return None
        everything = jax.tree.map(first_shard, self._gather(found, biases))
        return self._assemble(*everything)

    @cached_property
    def _gather(self) -> Callable:
        """Shards of masters by device -> all of each, on every device of the first rank."""
        layout = self.layout

        def body(found: dict[str, jax.Array], biases: dict[int, nnx.State]):
            whole = {}
            for key, x in own(found).items():
                stage, name = layout.place_of(key)
                for dim, axes in enumerate(layout.shardings[stage].specs[name]):
                    if axes:
                        x = lax.all_gather(x, axes, axis=dim, tiled=True)
                whole[key] = x
            return by_device((whole, own(biases)))

        sharding = RunSharding(layout.meshes[0])
        return jax.jit(sharding.per_device(body, (PER_DEVICE,) * 2, PER_DEVICE))

    @cached_property
    def _assemble(self) -> Callable:
        layout = self.layout

        def assemble(found: dict[str, jax.Array], biases: dict[int, nnx.State]) -> TrainState:
            found, biases = own(found), own(biases)
            params = [layout.state_of(stage, found) for stage in layout.stage_numbers]
            return TrainState(
                joined(layout, layout.whole.params, params),
                joined(layout, layout.whole.biases, [biases[s] for s in layout.stage_numbers]),
                (),
            )

        return jax.jit(assemble)

    # --- validation ------------------------------------------------------------------------------

    def make_validate(self, byte_lengths_V: np.ndarray) -> Validate:
        """`validate(state, rows, indices)`, as `validation.make_validate`'s."""
        like = (
            jax.ShapeDtypeStruct((self.layout.meshes[0].size,), self.layout.high),
            *[jax.ShapeDtypeStruct((self.layout.meshes[0].size,), np.dtype("int32"))] * 2,
        )
        evaluate = self._evaluate(lambda programs: programs.evaluating(byte_lengths_V), like)
        return validating(self.cfg, evaluate, self.own_rows)

    def make_scores(self) -> Scores:
        """`scores(state, batch)`, as `scoring.make_scores`'s."""
        places, (rows, length) = self.pipeline.rows_placed.rows, self._parts
        like = jax.ShapeDtypeStruct((self.layout.meshes[0].size, rows, length), self.layout.high)
        evaluate = self._evaluate(StagePrograms.scoring, like)
        return scoring(self.cfg, evaluate, self.own_rows, places)

    @property
    def _parts(self) -> tuple[int, int]:
        """Parts of rows in a micro-batch, and tokens of each."""
        return self.pipeline.rows * self.cfg.mesh.row_shards, self.cfg.part_length

    def _evaluate(
        self, make: Callable[[StagePrograms], Callable], like: Any
    ) -> Callable[[TrainState], Callable[[Batch], Any]]:
        """Forward through all stages up to the head, by the programs that `make` gives of each; the
        last one's result is `like` this, by device, and on all ranks the same.
        """
        pipeline, layout = self.pipeline, self.layout
        last = next(s for s, cut in enumerate(layout.cuts) if cut.head)
        programs = {
            stage: make(pipeline.ranks[rank].chunks[chunk])
            for stage, (rank, chunk) in layout.home.items()
            if rank in pipeline.ranks and stage <= last
        }

        def of_state(state: TrainState) -> Callable[[Batch], Any]:
            prepared = pipeline.prepare(weights_by_stage(state))

            def of_batch(batch: Batch) -> Any:
                x = None
                for stage in range(last + 1):
                    x = self._evaluated(stage, x, batch, prepared, programs)
                given = {layout.rank_of(last): x} if layout.rank_of(last) in pipeline.ranks else {}
                found = pipeline.crossings.summed(given, like)[pipeline.here[0]]
                return jax.tree.map(lambda x: first_shard(x)[0], found)

            return of_batch

        return of_state

    def _evaluated(self, stage: int, x: Any, batch: Batch, prepared: Any, programs: Any) -> Any:
        """What a stage makes of what the one before has handed on, from wherever that lies."""
        pipeline, layout = self.pipeline, self.layout
        rank, chunk = layout.home[stage]
        if stage and layout.rank_of(stage - 1) != rank:
            like = layout.message(layout.meshes[rank], pipeline.rows)
            x = pipeline.crossings.send(layout.rank_of(stage - 1), rank, x, like)
        if rank not in pipeline.ranks:
            return None
        weights, biases = prepared[rank]
        own = pipeline.ranks[rank].of_chunks(weights)[chunk]
        rows = pipeline.rows_placed.microbatch(rank, batch, 0, 1)
        return programs[stage](own, biases[stage], x, rows)
