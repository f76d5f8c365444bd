"""The model that learns to prove: 1.3 million parameters, and one step on the text of easy proofs,
which gives it a tokenizer.

    python -m dsv3_jax.train --config experiments/expert_iteration/config.py

Hardware: two CPU cores, 1 GB, a minute. Outcome: README beside this file.
"""

from dataclasses import replace

from dsv3_jax.config import DataConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import tiny


def config() -> RunConfig:
    return RunConfig(
        model=replace(
            tiny(),
            vocab_size=320,
            d_model=192,
            num_layers=3,
            num_experts=4,
            experts_per_token=2,
            num_groups=2,
            num_kept_groups=2,
            expert_hidden=128,
            dense_hidden=384,
            mtp_depth=0,
            max_length=256,
        ),
        data=DataConfig(source="runs/expert_iteration/proofs.txt", length=128),
        train=TrainConfig(steps=1, rows=16, dtype="float32"),
        schedule=ScheduleConfig(learning_rate=3e-3, warmup_steps=0, bias_speed=3e-3),
        output=OutputConfig(name="base", save_every=1, sample_tokens=0),
    )
