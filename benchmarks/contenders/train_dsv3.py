"""Trains dsv3_jax on one batch, a step for every line read.

Run by train_cpu.py with any interpreter that has the project; the one argument is JSON.
"""

import json
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from answering import answer

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.config.run import from_dict
from dsv3_jax.data.loader import Batch
from dsv3_jax.train.machine import matmul_peak
from dsv3_jax.train.step import Coefficients, init_state, make_step


def main() -> None:
    options = json.loads(sys.argv[1])
    cfg = tiny_run()
    cfg = replace(
        cfg,
        model=from_dict(ModelConfig, options["model"]),
        train=replace(
            cfg.train, rows=options["rows"], dtype=options["dtype"], remat=options["remat"]
        ),
        data=replace(cfg.data, length=options["length"]),
    )
    graphdef, state = init_state(cfg)
    step = make_step(graphdef, cfg)
    size = options["rows"], options["length"]
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, size, np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(np.roll(tokens, -1, 1)))
    coefficients = Coefficients(*(jnp.float32(x) for x in (1e-3, 1e-3, 0.3, jnp.inf)))

    def work() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, coefficients))
        if not metrics.applied:
            raise SystemExit(f"the loss is {metrics.loss}")
        time.sleep(0.001)  # XLA frees temporary memory just after the results are there

    answer(
        work,
        warm_up=options["warm_up"],
        versions=f"jax {jax.__version__}",
        matmul_peak=matmul_peak(options["dtype"]),
    )


if __name__ == "__main__":
    main()
