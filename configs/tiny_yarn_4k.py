"""The default run's second long-context phase: from 1,024 to 4,096 tokens, on four devices.

    python -m dsv3_jax.train --config configs/tiny_yarn_4k.py --devices 4 \
        --init-from tiny_yarn_1k-001

Hardware: two CPU cores, 4 GB, some ten minutes. The devices are two nodes of two.
YaRN's factor is 20 in both phases, 1.25 times the whole extension, as the report's 40 is of 4K to
128K.
"""

from dataclasses import replace
from pathlib import Path

from dsv3_jax.config import RunConfig
from dsv3_jax.config.load import load_config

LENGTH, ROWS = 4096, 1


def config() -> RunConfig:
    run = load_config(Path(__file__).with_name("tiny_yarn_1k.py"))
    return replace(
        run,
        model=replace(run.model, max_length=LENGTH),
        data=replace(run.data, length=LENGTH),
        train=replace(run.train, rows=ROWS),
        mesh=replace(run.mesh, node=2, sequence="node_local"),
        output=replace(run.output, name="tiny_yarn_4k", eval_rows=4),
    )
