"""A mixture of 32 experts, 4 chosen, on the standard library's source, 400 steps of 2,048 tokens.

    python -m dsv3_jax.train --config experiments/loss_free_balancing/config.py

Hardware: two CPU cores, 2 GB, 3 to 5 minutes. Outcome: README beside this file.
"""

from dataclasses import replace

from dsv3_jax.config import DataConfig, OutputConfig, RunConfig, ScheduleConfig, TrainConfig
from dsv3_jax.config.presets import tiny


def config() -> RunConfig:
    model = replace(
        tiny(),
        num_layers=4,
        num_experts=32,
        expert_hidden=64,
        # Without groups, nothing but the balancing moves loads; node_limited_routing sets them.
        num_groups=1,
        num_kept_groups=1,
        mtp_depth=0,
    )
    return RunConfig(
        model=model,
        data=DataConfig(length=256),
        train=TrainConfig(steps=400, rows=8, seed=0),
        schedule=ScheduleConfig(
            learning_rate=6e-3, warmup_steps=30, final_learning_rate=3e-4, bias_speed=3e-3
        ),
        output=OutputConfig(
            name="balancing", log_every=1, eval_every=200, save_every=400, sample_tokens=0
        ),
    )
