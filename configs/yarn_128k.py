"""DeepSeek-V3's second long-context phase: from 32K to 128K tokens, 1,000 steps (report 4.3).

    python -m dsv3_jax.train --config configs/yarn_128k.py --init-from yarn_32k-001 --init-moments
    python -m dsv3_jax.plan --config configs/yarn_128k.py

Hardware: the report's 2048 H800. The 64 devices of eight nodes share a row, two in a micro-batch: a
device has 2,048 tokens of each, and a step has 120 micro-batches, as in pre-training. Rows and
learning rate are the report's; how it spread its rows is unpublished. The rest is as in
configs/yarn_32k.py.
"""

from dataclasses import replace

from dsv3_jax.config import (
    DataConfig,
    MeshConfig,
    OutputConfig,
    PipelineConfig,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from dsv3_jax.config.presets import dsv3_671b

LENGTH, ROWS = 128 * 1024, 480


def config() -> RunConfig:
    return RunConfig(
        model=replace(dsv3_671b(), max_length=LENGTH),
        data=DataConfig(length=LENGTH, fim_rate=0.1, split_rate=0.1),
        train=TrainConfig(steps=1000, rows=ROWS, microbatches=120, remat="report"),
        schedule=ScheduleConfig(
            learning_rate=7.3e-6,
            final_learning_rate=7.3e-6,
            warmup_steps=0,
            bias_speed=0.0,
            mtp_weight=0.1,
        ),
        quant=QuantConfig("fp8"),
        mesh=MeshConfig(pipe=16, data=2, node=8, local=8, sequence="node_local"),
        pipeline=PipelineConfig("dualpipe"),
        output=OutputConfig(name="yarn_128k", save_every=250),
    )
