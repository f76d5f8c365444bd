"""The default run with its linears in FP8: 1x128 and 128x128 blocks, as the report trains.

    python -m dsv3_jax.train --config configs/tiny_fp8.py

Hardware: two CPU cores, 4 GB. Outcome: docs/verification.md, beside the default run's.
"""

from dataclasses import replace

from dsv3_jax.config import QuantConfig, RunConfig
from dsv3_jax.config.presets import tiny_run


def config() -> RunConfig:
    run = tiny_run()
    return replace(run, quant=QuantConfig("fp8"), output=replace(run.output, name="tiny_fp8"))
