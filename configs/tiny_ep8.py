"""The default run with its experts on eight devices: two nodes of four, emulated on a CPU.

    python -m dsv3_jax.train --config configs/tiny_ep8.py --devices 8

Hardware: two CPU cores, 4 GB. Outcome: docs/verification.md.
"""

from dataclasses import replace

from dsv3_jax.config import MeshConfig, RunConfig
from dsv3_jax.config.presets import tiny_run


def config() -> RunConfig:
    run = tiny_run()
    return replace(
        run, mesh=MeshConfig(node=2, local=4), output=replace(run.output, name="tiny_ep8")
    )
