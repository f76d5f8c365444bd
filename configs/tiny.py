"""The default run, as a file to start from.

    python -m dsv3_jax.train --config configs/tiny.py

Hardware: two CPU cores, 4 GB. Outcome: README.
"""

from dsv3_jax.config import RunConfig
from dsv3_jax.config.presets import tiny_run


def config() -> RunConfig:
    return tiny_run()
