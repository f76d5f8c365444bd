"""Half an hour on two cores: a V3 in miniature that compresses Python source better than zlib does.

    python -m dsv3_jax.train --config configs/stdlib_30min.py

Hardware: two CPU cores, 2 GB.
"""

from dataclasses import replace

from dsv3_jax.config import RunConfig
from dsv3_jax.config.presets import tiny_run


def config() -> RunConfig:
    run = tiny_run()
    return replace(
        run,
        train=replace(run.train, steps=3000),
        output=replace(run.output, name="stdlib_30min", eval_every=250, save_every=500),
    )
