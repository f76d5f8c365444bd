"""Presets against the published sizes."""

import pytest

from dsv3_jax.config.presets import PRESETS


def test_every_preset_is_reachable_by_its_name():
    names = "tiny bench_cpu moe_16b moe_228b dsv3_671b moonlight_16b kimi_k2".split()
    assert list(PRESETS) == names


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dsv3_671b", (61, 3, 7168, 128, 1536, 512, 18432, 2048, 256, 8, 1, 8, 4, 2.5, 129280)),
        ("moe_16b", (27, 1, 2048, 16, None, 512, 10944, 1408, 64, 6, 2, 1, 1, 2.446, 102400)),
        ("moe_228b", (60, 3, 5120, 128, 1536, 512, 12288, 1536, 160, 6, 2, 8, 3, 2.446, 129280)),
        ("moonlight_16b", (27, 1, 2048, 16, None, 512, 11264, 1408, 64, 6, 2, 1, 1, 2.446, 163840)),
        ("kimi_k2", (61, 1, 7168, 64, 1536, 512, 18432, 2048, 384, 8, 1, 1, 1, 2.827, 163840)),
        ("bench_cpu", (4, 1, 256, 8, 128, 64, 704, 128, 32, 4, 1, 4, 2, 2.5, 4096)),
    ],
)
def test_sizes_are_the_published_ones(name: str, sizes: tuple):
    cfg = PRESETS[name]()
    assert sizes == (
        cfg.num_layers,
        cfg.num_dense_layers,
        cfg.d_model,
        cfg.num_heads,
        cfg.q_latent,
        cfg.kv_latent,
        cfg.dense_hidden,
        cfg.expert_hidden,
        cfg.num_experts,
        cfg.experts_per_token,
        cfg.num_shared_experts,
        cfg.num_groups,
        cfg.num_kept_groups,
        cfg.gate_scale,
        cfg.vocab_size,
    )
    head_sizes = (cfg.nope_dim, cfg.rope_dim, cfg.v_dim)
    assert head_sizes == ((32, 16, 32) if name == "bench_cpu" else (128, 64, 128))


def test_details_that_differ_between_relatives():
    moonlight, kimi, bench = (PRESETS[name]() for name in ("moonlight_16b", "kimi_k2", "bench_cpu"))
    assert (moonlight.rms_eps, moonlight.rope_theta, moonlight.max_length) == (1e-5, 50000, 8192)
    assert (moonlight.bos_id, moonlight.eos_id) == (163584, 163586)
    assert not moonlight.yarn_active
    assert (kimi.rope_theta, kimi.yarn.factor, kimi.yarn_active) == (50000, 32, True)
    assert moonlight.mtp_depth == kimi.mtp_depth == bench.mtp_depth == 0
    assert all(PRESETS[name]().init_std == 0.006 for name in ("moe_16b", "moe_228b", "dsv3_671b"))
