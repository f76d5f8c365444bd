"""Published and house shapes. A file in `configs/` takes one and says what it varies.

The shapes of the report's two ablation models are unpublished: `moe_16b` is DeepSeek-V2-Lite's
(15.706B, the printed 15.7B) and `moe_228b` the only V2-like shape that gives the printed pair
228.7B / 20.9B. Their gate factor under normalised sigmoid gates is unpublished too; sqrt(6),
which Moonlight uses for the same six experts of 64, keeps the routed sum near unit variance.
"""

from dataclasses import replace

from dsv3_jax.config.model import ModelConfig, YarnConfig
from dsv3_jax.config.run import (
    DataConfig,
    OutputConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

NO_YARN = YarnConfig(factor=1.0)


def dsv3_671b() -> ModelConfig:
    """DeepSeek-V3 as pre-trained (report 4.2): 671.03B parameters, 36.63B active."""
    return ModelConfig()


def moe_16b() -> ModelConfig:
    """The report's small ablation model: 15.7B parameters, 2.4B active (report 4.5, Table 4)."""
    return ModelConfig(
        vocab_size=102400,
        d_model=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_latent=None,
        dense_hidden=10944,
        expert_hidden=1408,
        num_experts=64,
        experts_per_token=6,
        num_shared_experts=2,
        num_groups=1,
        num_kept_groups=1,
        gate_scale=2.446,
    )


def moe_228b() -> ModelConfig:
    """The report's large ablation model (4.5, Table 4), shape inferred: 228.7B, 20.9B active."""
    return ModelConfig(
        d_model=5120,
        num_layers=60,
        dense_hidden=12288,
        expert_hidden=1536,
        num_experts=160,
        experts_per_token=6,
        num_shared_experts=2,
        num_kept_groups=3,
        gate_scale=2.446,
    )


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B, an open model of the same architecture."""
    return replace(
        moe_16b(),
        vocab_size=163840,
        dense_hidden=11264,
        mtp_depth=0,
        max_length=8192,
        rope_theta=50000.0,
        yarn=NO_YARN,
        rms_eps=1e-5,
        bos_id=163584,
        eos_id=163586,
    )


def kimi_k2() -> ModelConfig:
    """Kimi-K2: 1.03T parameters.

    YaRN settings and eps differ between its releases: a folder's own config wins.
    """
    return ModelConfig(
        vocab_size=163840,
        num_dense_layers=1,
        num_heads=64,
        num_experts=384,
        num_groups=1,
        num_kept_groups=1,
        gate_scale=2.827,
        mtp_depth=0,
        max_length=131072,
        rope_theta=50000.0,
        yarn=YarnConfig(factor=32.0, beta_fast=1.0),
        bos_id=163584,
        eos_id=163586,
    )


def bench_cpu() -> ModelConfig:
    """Fixed shape of the CPU benchmarks; figures of different dates compare only while it stays."""
    return ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=4,
        num_dense_layers=1,
        num_heads=8,
        q_latent=128,
        kv_latent=64,
        nope_dim=32,
        rope_dim=16,
        v_dim=32,
        dense_hidden=704,
        expert_hidden=128,
        num_experts=32,
        experts_per_token=4,
        num_groups=4,
        num_kept_groups=2,
        mtp_depth=0,
    )


def tiny() -> ModelConfig:
    """V3 in miniature for a laptop; its sizes split over 2, 4 and 8 devices."""
    return ModelConfig(
        vocab_size=2048,
        d_model=128,
        num_layers=8,
        num_dense_layers=1,
        num_heads=4,
        q_latent=64,
        kv_latent=32,
        nope_dim=32,
        rope_dim=16,
        v_dim=32,
        dense_hidden=512,
        expert_hidden=128,
        num_experts=16,
        experts_per_token=4,
        num_groups=4,
        num_kept_groups=2,
        max_length=1024,
        # At 0.006 and D 128 a layer would change its input by almost nothing.
        init_std=0.03,
    )


PRESETS = {
    preset.__name__: preset
    for preset in (tiny, bench_cpu, moe_16b, moe_228b, dsv3_671b, moonlight_16b, kimi_k2)
}


def tiny_run() -> RunConfig:
    """The default run: `tiny` on the standard library's source, about four minutes on two cores."""
    return RunConfig(
        model=tiny(),
        data=DataConfig(length=256),
        train=TrainConfig(steps=400, rows=8),
        # 400 steps leave the bias time for 1.2 at this speed; at the report's 1e-3, MaxVio was
        # still above 1 after half of the run.
        schedule=ScheduleConfig(
            learning_rate=6e-3, warmup_steps=30, final_learning_rate=3e-4, bias_speed=3e-3
        ),
        output=OutputConfig(name="tiny", eval_every=100, save_every=200),
    )
