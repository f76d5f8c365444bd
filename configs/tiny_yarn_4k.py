"""The default run's second long-context phase: from 1,024 to 4,096 tokens, on four devices.

    python -m dsv3_jax.train --config configs/tiny_yarn_4k.py --devices 4 \
        --init-from tiny_yarn_1k-001

Hardware: two CPU cores, 4 GB, some ten minutes. The devices are two nodes of two.
YaRN's factor is 20 in both phases, 1.25 times the whole extension, as the report's 40 is of 4K to
128K.
"""

from dataclasses import replace

from dsv3_jax.config import MeshConfig, RunConfig, YarnConfig
from dsv3_jax.config.presets import tiny_run

LENGTH, ROWS = 4096, 1


def config() -> RunConfig:
    run = tiny_run()
    return replace(
        run,
        model=replace(
            run.model, max_length=LENGTH, yarn=YarnConfig(factor=20.0, original_length=256)
        ),
        data=replace(run.data, length=LENGTH),
        train=replace(run.train, steps=60, rows=ROWS),
        schedule=replace(
            run.schedule, learning_rate=3e-4, warmup_steps=0, bias_speed=0.0, mtp_weight=0.1
        ),
        mesh=MeshConfig(node=2, local=2, sequence="node_local", bucket_factor=2.0),
        output=replace(run.output, name="tiny_yarn_4k", eval_every=30, eval_rows=4),
    )
