"""The default run with its experts on eight devices: two nodes of four, emulated on a CPU.

    python -m dsv3_jax.train --config configs/tiny_ep8.py --devices 8

Hardware: two CPU cores, 4 GB; outcome and time: README, "Many devices". With two nodes a token may
use both; `--mesh.node 4 --mesh.local 2` shows the limit of two nodes at work.
"""

from dataclasses import replace

from dsv3_jax.config import MeshConfig, RunConfig
from dsv3_jax.config.presets import tiny_run


def config() -> RunConfig:
    run = tiny_run()
    # 256 tokens of one text a device route unevenly: buckets of 1.25 shares take two rounds.
    mesh = MeshConfig(node=2, local=4, bucket_factor=2.5)
    return replace(run, mesh=mesh, output=replace(run.output, name="tiny_ep8"))
