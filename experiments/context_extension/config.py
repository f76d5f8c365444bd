"""A small model pre-trained at 128 tokens, to be extended to 512 and 2,048.

    python experiments/context_extension/run.py

YaRN's values stand here already, since they act beyond the original length only: a longer
`max_length` is all that an extension changes. The factor is 1.25 times the whole extension, as the
report's is (40 for 32). With base 1,000 and 4 turns for 32, two of eight pairs keep their frequency
and four are slowed by the whole factor; at the report's sizes 11 and 9 of 32. Outcome: README
beside this file.
"""

from dataclasses import replace

from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    YarnConfig,
)
from dsv3_jax.config.presets import tiny

ORIGINAL = 128


def model() -> ModelConfig:
    return replace(
        tiny(),
        vocab_size=1024,
        d_model=64,
        num_layers=2,
        num_dense_layers=1,
        q_latent=None,
        kv_latent=48,
        nope_dim=16,
        rope_dim=16,
        v_dim=16,
        dense_hidden=128,
        expert_hidden=64,
        num_experts=4,
        experts_per_token=2,
        num_groups=1,
        num_kept_groups=1,
        mtp_depth=0,
        max_length=ORIGINAL,
        rope_theta=1000.0,
        yarn=YarnConfig(factor=20.0, beta_fast=4.0, original_length=ORIGINAL),
        init_std=0.1,
    )


def config() -> RunConfig:
    return RunConfig(
        model=model(),
        data=DataConfig(length=ORIGINAL),
        train=TrainConfig(steps=1500, rows=16, dtype="float32"),
        schedule=ScheduleConfig(
            learning_rate=4e-3,
            warmup_steps=50,
            final_learning_rate=3e-4,  # and the extension's, all the time
            bias_speed=3e-3,
        ),
        output=OutputConfig(name="original", eval_every=400, save_every=200, sample_tokens=0),
    )
