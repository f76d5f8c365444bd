"""The pipeline's train step that benchmarks repeat, on one batch of random tokens: whole, part by
part, or operation by operation.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.orders import Item, Transfer
from dsv3_jax.parallel.schedules import make
from dsv3_jax.parallel.stages import cut
from dsv3_jax.train.pipeline import Pipeline
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_state import by_stage
from dsv3_jax.train.step import Coefficients, StepMetrics

Parts = dict[str, tuple[float, float]]


class PipelineStep:
    """Each call makes a step and waits for it."""

    def __init__(self, cfg: RunConfig) -> None:
        """The configuration's stages are written ones."""
        model, mesh, count = cfg.model, cfg.mesh, cfg.train.microbatches
        stages = make(cfg.pipeline.schedule, mesh.pipe, count).stages
        cuts = cut(cfg.pipeline.stages, stages, model.num_layers, model.mtp_depth, ())
        self.pipeline = Pipeline(cfg, Layout(cfg, make_mesh(mesh), cuts))
        self.state = self.pipeline.init_state()
        size = cfg.train.rows, cfg.data.length
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, size, np.int32)
        self.batch = Batch(tokens, np.roll(tokens, -1, 1))
        self.coefficients = Coefficients(*(jnp.float32(x) for x in (1e-3, 1e-3, 0.3, jnp.inf)))

    def __call__(self) -> StepMetrics:
        """SystemExit if an update cannot be made."""
        found = self.pipeline.step(self.state, self.batch, self.coefficients)
        self.state, metrics = jax.block_until_ready(found)
        if not metrics.applied:
            raise SystemExit(f"the loss is {metrics.loss}")
        return metrics

    def parts(self) -> Parts:
        """Of a step's parts up to its gradients, seconds until it is handed over and until done."""
        pipeline, found = self.pipeline, {}
        weight = self.coefficients.mtp_weight
        steps, schedule = self._timed(
            found, "weights", lambda: pipeline.begin(by_stage(self.state), self.batch, weight)
        )
        self._timed(found, "passes", lambda: pipeline.walk(schedule, steps), _sums_of(steps))
        self._timed(found, "gradients to owners", lambda: pipeline.reduce(steps))
        return found

    def operations(self) -> dict[str, list[float]]:
        """Seconds of every operation of a kind, when each is waited for."""
        weight = self.coefficients.mtp_weight
        steps, schedule = self.pipeline.begin(by_stage(self.state), self.batch, weight)
        jax.block_until_ready(_arrays_of(steps))
        found: dict[str, list[float]] = {}
        begun = time.perf_counter()

        def watch(rank: int, item: Item, result: Any) -> None:
            nonlocal begun
            jax.block_until_ready((result, steps[rank].sums))
            kind = "transfer" if isinstance(item, Transfer) else item.kind
            found.setdefault(kind, []).append(time.perf_counter() - begun)
            begun = time.perf_counter()

        self.pipeline.walk(schedule, steps, watch)
        return found

    def _timed(
        self,
        found: Parts,
        name: str,
        work: Callable[[], Any],
        wait: Callable[[], Any] | None = None,
    ) -> Any:
        begun = time.perf_counter()
        result = work()
        handed = time.perf_counter() - begun
        jax.block_until_ready(wait() if wait else _arrays_of(result))
        found[name] = handed, time.perf_counter() - begun
        return result


def _arrays_of(result: Any) -> list[Any]:
    """Of what a part gives, rank steps among it."""
    steps = result[0] if isinstance(result, tuple) else result
    if any(hasattr(step, "sums") for step in steps.values()):
        return _sums_of(steps)()
    return jax.tree.leaves(result)


def _sums_of(steps: dict[int, Any]) -> Callable[[], list[Any]]:
    return lambda: [(step.sums, step.weights) for step in steps.values()]
