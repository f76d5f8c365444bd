"""A mixture of 13.2 M parameters on the standard library's source, 1,000 steps of 1,024 tokens.

    python -m dsv3_jax.train --config experiments/fp8_vs_bf16/config.py --quant.recipe fp8

Hardware: two CPU cores, 3 GB, 10 to 20 minutes. Outcome: README beside this file.
"""

from dataclasses import replace

from dsv3_jax.config import DataConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import bench_cpu


def config() -> RunConfig:
    return RunConfig(
        model=replace(bench_cpu(), init_std=0.02),
        data=DataConfig(length=128),
        train=TrainConfig(steps=1000, rows=8, seed=0),
        schedule=ScheduleConfig(
            learning_rate=4e-3, warmup_steps=50, final_learning_rate=4e-4, bias_speed=3e-3
        ),
        output=OutputConfig(
            name="fp8_vs_bf16", log_every=1, eval_every=250, save_every=500, sample_tokens=0
        ),
    )
