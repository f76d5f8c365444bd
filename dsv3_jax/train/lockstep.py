"""Processes of one run stay in step: a signal that came to any of them ends all after the same one.

With every step goes a program of two small collectives: the signals, and which rows are finite,
that every process then knows whole. Its result is read with the step's, so it costs no wait of its
own. In one process a signal counts at once, and no program is run.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config.mesh import AXES
from dsv3_jax.parallel import processes
from dsv3_jax.train.sharding import RunSharding
from dsv3_jax.train.step import StepMetrics


class Lockstep:
    """Of one run. `stopped_by` is the signal that ends it, or None."""

    def __init__(self, sharding: RunSharding) -> None:
        self.stopped_by: int | None = None
        self._came = 0
        self._mesh = sharding.mesh if processes.count() > 1 else None
        if self._mesh:
            whole = NamedSharding(self._mesh, PartitionSpec())
            self._largest = jax.jit(jnp.max, out_shardings=whole)
            self._share = jax.jit(
                lambda came, rows: (came.max(), jax.sharding.reshard(rows, whole)),
                out_shardings=(whole, whole),
            )

    @contextlib.contextmanager
    def hearing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within it SIGTERM and SIGINT end the run after a step, which is said at once.

        A second one acts as it always does.
        """
        previous: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self._came = self._came or number
            if not self._mesh:
                self.stopped_by = self._came
            signal.signal(number, previous[number])
            name = signal.Signals(number).name
            say(f"{name}: saving after this step; once more leaves without it")

        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def share(self, metrics: StepMetrics) -> tuple[StepMetrics, jax.Array | None]:
        """Behind a step: its metrics as every process can read them, and what `take` wants."""
        if not self._mesh:
            return metrics, None
        each = NamedSharding(self._mesh, PartitionSpec(AXES))
        came = jax.make_array_from_callback(
            (self._mesh.size,), each, lambda index: np.array([self._came], np.int32)
        )
        rows_B = metrics.row_is_finite_B
        if rows_B.is_fully_addressable:  # a pipeline has told every process
            return metrics, self._largest(came)
        signals, rows_B = self._share(came, rows_B)
        return metrics._replace(row_is_finite_B=rows_B), signals

    def take(self, signals: jax.Array | None) -> None:
        """The signals that had come to any process when a step was launched."""
        if signals is not None and self.stopped_by is None:
            self.stopped_by = int(signals) or None
