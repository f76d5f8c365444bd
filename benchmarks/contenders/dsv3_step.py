"""The train step that benchmarks repeat: this project's, on one batch of random tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.train.sharding import make_sharding
from dsv3_jax.train.step import Coefficients, StepMetrics, abstract_state, init_state, make_step


def step_of(cfg: RunConfig) -> Callable[[], StepMetrics]:
    """Each call makes a step and waits for it. SystemExit if an update cannot be made."""
    graphdef, shapes = abstract_state(cfg)
    sharding = make_sharding(cfg, shapes.params)
    state = init_state(cfg, sharding)
    step = make_step(graphdef, cfg, sharding)
    size = cfg.train.rows, cfg.data.length
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, size, np.int32)
    batch = sharding.put_rows(Batch(jnp.asarray(tokens), jnp.asarray(np.roll(tokens, -1, 1))))
    coefficients = Coefficients(*(jnp.float32(x) for x in (1e-3, 1e-3, 0.3, jnp.inf)))

    def work() -> StepMetrics:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, coefficients))
        if not metrics.applied:
            raise SystemExit(f"the loss is {metrics.loss}")
        return metrics

    return work
