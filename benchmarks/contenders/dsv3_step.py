"""The train step that benchmarks repeat: this project's, on one batch of random tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.data.loader import Batch
from dsv3_jax.train.step import Coefficients, StepMetrics, abstract_state, init_state, make_step


def step_of(cfg: RunConfig) -> Callable[[], StepMetrics]:
    """Each call makes a step and waits for it. SystemExit if an update cannot be made."""
    state = init_state(cfg)
    step = make_step(abstract_state(cfg)[0], cfg)
    size = cfg.train.rows, cfg.data.length
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, size, np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(np.roll(tokens, -1, 1)))
    coefficients = Coefficients(*(jnp.float32(x) for x in (1e-3, 1e-3, 0.3, jnp.inf)))

    def work() -> StepMetrics:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, coefficients))
        if not metrics.applied:
            raise SystemExit(f"the loss is {metrics.loss}")
        return metrics

    return work
