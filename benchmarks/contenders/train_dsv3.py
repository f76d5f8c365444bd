"""Trains dsv3_jax on one batch, a step for every line read.

Run by train_cpu.py with any interpreter that has the project; the one argument is JSON.
"""

import json
import sys
import time
from dataclasses import replace

import jax
from answering import answer
from dsv3_step import step_of

from dsv3_jax.config import MeshConfig, QuantConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.config.run import from_dict
from dsv3_jax.train.machine import matmul_peak


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
        quant=QuantConfig(options["recipe"]),
        mesh=MeshConfig(**options.get("mesh", {})),
    )
    step = step_of(cfg)

    def work() -> None:
        step()
        time.sleep(0.001)  # XLA frees temporary memory just after the results are there

    answer(
        work,
        warm_up=options["warm_up"],
        versions=f"jax {jax.__version__}",
        matmul_peak=matmul_peak(options["dtype"]),
    )


if __name__ == "__main__":
    main()
