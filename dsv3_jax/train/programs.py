"""Compiled training steps, one for each number of rows: the first while the weights are drawn."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.quant.wide import wide
from dsv3_jax.train.scoring import Scores, make_scores
from dsv3_jax.train.sharding import ONE_DEVICE, RunSharding
from dsv3_jax.train.step import Coefficients, TrainState, init_state, make_step
from dsv3_jax.train.validation import Validate, make_validate


def batch_of(cfg: RunConfig, array: Callable) -> Batch:
    """A run's batch, each array of it made from its dtype."""
    tokens, data = array(jnp.int32), cfg.data
    weights = array(wide(jnp.dtype(cfg.train.dtype))) if data.weighted else None
    return Batch(tokens, tokens, tokens if data.isolate else None, weights)


class StepPrograms:
    """The step of one run, compiled ahead of the step that needs it, so that no step's time
    includes that.

    A process that fails while a compilation runs ends only with that.
    """

    def __init__(
        self,
        cfg: RunConfig,
        graphdef: nnx.GraphDef,
        shapes: TrainState,
        sharding: RunSharding = ONE_DEVICE,
    ) -> None:
        """`shapes` of the state, from `abstract_state`."""
        self.cfg, self.sharding, self.graphdef = cfg, sharding, graphdef
        self.shapes, self.step = sharding.placed_shapes(shapes), make_step(graphdef, cfg, sharding)
        self.programs: dict[int, Future[Callable]] = {}

    def where(self) -> str:
        """What the devices are at."""
        return "computing, or waiting for other devices"

    def measured(self) -> None:
        """Nothing: a step is one program."""

    def init_state(self) -> TrainState:
        """A fresh one from the run's seed."""
        return init_state(self.cfg, self.sharding)

    def make_validate(self, byte_lengths_V: np.ndarray) -> Validate:
        """Of the run's model."""
        return make_validate(self.graphdef, self.cfg, byte_lengths_V, self.sharding)

    def make_scores(self) -> Scores:
        """Of the run's model."""
        return make_scores(self.graphdef, self.cfg, self.sharding)

    def begin(self, rows: int) -> None:
        """Traces the step of `rows` rows, and compiles it in a thread of its own.

        Tracing is Python, as is what the caller does next: side by side both would only be later.
        """
        if rows not in self.programs:
            lowered = self.step.lower(*self.arguments(rows))
            thread = ThreadPoolExecutor(1, "compile")
            self.programs[rows] = thread.submit(lowered.compile)
            thread.shutdown(wait=False)

    def __contains__(self, rows: int) -> bool:
        """Whether asking for the step of so many rows takes no time."""
        return rows in self.programs and self.programs[rows].done()

    def of(self, rows: int) -> Callable:
        """`step(state, batch, coefficients)` for so many rows; waits until it is compiled, and
        raises what that raised.
        """
        self.begin(rows)
        return self.programs[rows].result()

    def arguments(self, rows: int) -> tuple[TrainState, Batch, Coefficients]:
        """Of the step of so many rows, their shapes."""
        shape = rows * self.cfg.mesh.row_shards, self.cfg.part_length
        array = partial(jax.ShapeDtypeStruct, shape, sharding=self.sharding.row_placement)
        batch = batch_of(self.cfg, array)
        coefficients = Coefficients(*[jax.ShapeDtypeStruct((), jnp.float32)] * 4)
        return self.shapes, batch, coefficients
