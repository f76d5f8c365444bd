"""The model that is fine-tuned: a quarter of the default one, 200 steps of 2,048 tokens of source.

    python -m dsv3_jax.train --config experiments/sft_tiny/config.py

Hardware: two CPU cores, 2 GB, minutes (14 on a busy machine). Outcome: README beside this file.
"""

from dataclasses import replace

from dsv3_jax.config import DataConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import tiny


def config() -> RunConfig:
    return RunConfig(
        model=replace(tiny(), vocab_size=1024, num_layers=4, num_experts=8, expert_hidden=96),
        data=DataConfig(length=128),
        train=TrainConfig(steps=200, rows=16),
        schedule=ScheduleConfig(
            learning_rate=6e-3, warmup_steps=30, final_learning_rate=6e-4, bias_speed=3e-3
        ),
        output=OutputConfig(name="base", eval_every=100, save_every=200, sample_tokens=0),
    )
