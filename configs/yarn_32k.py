"""DeepSeek-V3's first long-context phase: from 4K to 32K tokens, 1,000 steps (report 4.3).

    python -m dsv3_jax.train --config configs/yarn_32k.py --init-from dsv3_671b-001 --init-moments
    python -m dsv3_jax.plan --config configs/yarn_32k.py

Hardware: the report's 2048 H800. Eight devices of a node share a row, so that each has 4,096 tokens
of a micro-batch, of which a step has 120, both as in pre-training. Rows and learning rate are the
report's; how it spread its rows is unpublished. Router biases rest and MTP keeps its weight, as at
the end of pre-training. Without --init-moments the phase begins with new moments.
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

LENGTH, ROWS = 32 * 1024, 1920


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
        mesh=MeshConfig(pipe=16, data=2, node=8, local=8, sequence="local"),
        pipeline=PipelineConfig("dualpipe"),
        output=OutputConfig(name="yarn_32k", save_every=250),
    )
