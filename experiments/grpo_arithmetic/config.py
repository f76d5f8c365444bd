"""The model that learns to add: 0.8 million parameters, one step on the text of the sums that it is
taught, which gives it weights and a tokenizer.

    python experiments/grpo_arithmetic/run.py

Hardware: two CPU cores, 1 GB, seconds. Outcome: README beside this file.
"""

from dataclasses import replace

from dsv3_jax.config import DataConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import tiny


def config() -> RunConfig:
    return RunConfig(
        model=replace(
            tiny(),
            vocab_size=300,
            num_layers=3,
            num_experts=8,
            experts_per_token=2,
            expert_hidden=64,
            dense_hidden=256,
            mtp_depth=0,
            max_length=128,
        ),
        data=DataConfig(source="runs/grpo_arithmetic/sums.txt", length=128),
        train=TrainConfig(steps=1, rows=16, dtype="float32"),
        schedule=ScheduleConfig(learning_rate=3e-3, warmup_steps=0, bias_speed=3e-3),
        output=OutputConfig(name="base", save_every=1, sample_tokens=0),
    )
