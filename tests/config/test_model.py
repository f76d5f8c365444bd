"""Model sizes: parameter counts of published models, and what is refused with which words."""

from dataclasses import replace

import jax
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.config.presets import dsv3_671b, kimi_k2, moe_16b, moe_228b, moonlight_16b, tiny
from dsv3_jax.model.transformer import DeepSeekV3
from tests.shapes import TINY, tiny_model


def test_defaults_are_the_released_model():
    assert ModelConfig() == dsv3_671b()


def test_parameter_counts_of_the_released_model():
    count = dsv3_671b().param_count()
    assert count.main == 671_026_419_200
    assert count.mtp == 11_610_068_224
    assert count.activated == 37_552_297_472
    assert count.activated_no_embedding == 36_625_618_432


def test_parameter_counts_of_the_ablation_models_are_the_printed_ones():
    """15.7B / 2.4B, and 228.7B / 20.9B with digits cut off."""
    small, large = moe_16b().param_count(), moe_228b().param_count()
    tenths = 10**8
    assert (small.main // tenths, small.activated_no_embedding // tenths) == (157, 24)
    assert (large.main // tenths, large.activated_no_embedding // tenths) == (2287, 209)


def test_the_small_ablation_model_is_v2_lite_and_router_biases():
    """15,706,484,224 parameters; 64 biases in each of 26 layers come with loss-free balancing."""
    assert moe_16b().param_count().main == 15_706_484_224 + 26 * 64


def test_parameter_counts_of_relatives():
    assert f"{moonlight_16b().param_count().main / 1e9:.2f}" == "15.96"
    assert f"{kimi_k2().param_count().main / 1e12:.2f}" == "1.03"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_latent": None},
        {"tied_head": True},
        {"mtp_depth": 0},
        {"mtp_depth": 3},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2},
        {"num_dense_layers": 0},
        {"num_dense_layers": 3, "mtp_depth": 0},
        {"v_dim": 3, "rope_dim": 2, "num_experts": 12},
    ],
    ids=str,
)
def test_counts_equal_the_elements_of_the_model(changes: dict):
    cfg = tiny_model(**changes)
    model = jax.eval_shape(lambda: DeepSeekV3(cfg, rngs=nnx.Rngs(0)))
    count, mtp = cfg.param_count(), elements(model.mtp)
    assert count.mtp == mtp
    assert count.main == elements(model) - mtp
    idle = 3 * cfg.d_model * cfg.expert_hidden * (cfg.num_experts - cfg.experts_per_token)
    assert count.activated == count.main - idle * cfg.num_moe_layers
    table = 0 if cfg.tied_head else cfg.vocab_size * cfg.d_model
    assert count.activated_no_embedding == count.activated - table


def elements(tree: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


REFUSED = [
    ({"num_heads": 0}, "model.num_heads is 0; allowed: at least 1"),
    ({"num_heads": 2.0}, "model.num_heads is 2.0; allowed: whole numbers"),
    ({"tied_head": 1}, "model.tied_head is 1; allowed: True, False"),
    ({"masked_score": "1"}, "model.masked_score is '1'; allowed: '-inf', '0'"),
    ({"d_model": -1}, "model.d_model is -1; allowed: at least 1"),
    ({"q_latent": 0}, "model.q_latent is 0; allowed: at least 1"),
    ({"mtp_depth": -1}, "model.mtp_depth is -1; allowed: at least 0"),
    ({"max_length": 0}, "model.max_length is 0; allowed: at least 1"),
    (
        {"num_dense_layers": 4},
        "model.num_dense_layers is 4; allowed: at most num_layers = 3",
    ),
    ({"rope_dim": 3}, "model.rope_dim is 3; allowed: even sizes (rotation pairs)"),
    ({"rope_theta": 0.0}, "model.rope_theta is 0.0; allowed: positive numbers"),
    ({"rms_eps": float("nan")}, "model.rms_eps is nan; allowed: finite numbers"),
    ({"init_std": float("inf")}, "model.init_std is inf; allowed: finite numbers"),
    ({"eos_id": 64}, "model.eos_id is 64; allowed: less than vocab_size = 64"),
    ({"d_model": 2**63}, "model.d_model is 9223372036854775808; allowed: at most 2147483647"),
    ({"num_layers": 10**9}, "model.num_layers is 1000000000; allowed: at most 10000"),
    ({"num_experts": 10**399}, f"model.num_experts is 1{0:017}...{0:019}; allowed: at most"),
    ({"gate_scale": 10**399}, f"model.gate_scale is 1{0:017}...{0:019}; allowed: finite"),
    ({"num_groups": 3}, "model.num_groups is 3, which does not divide num_experts = 8"),
    (
        {"num_kept_groups": 5},
        "model.num_kept_groups is 5; allowed: at most num_groups = 4",
    ),
    (
        {"num_groups": 8},
        "model.num_groups is 8 for 8 experts; allowed: at least 2 experts in a group",
    ),
    (
        {"experts_per_token": 5},
        "model.experts_per_token is 5; allowed: at most 4, the experts in 2 kept groups of 2",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_impossible_sizes_are_refused_with_field_value_and_what_is_allowed(changes, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        replace(TINY, **changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, "model.yarn.factor is 0.5; allowed: at least 1"),
        ({"factor": float("nan")}, "model.yarn.factor is nan; allowed: finite numbers"),
        (
            {"beta_slow": 33.0},
            "model.yarn: beta_slow 33.0 and beta_fast 32.0; allowed: 0 < beta_slow <= beta_fast",
        ),
        ({"original_length": 0}, "model.yarn.original_length is 0; allowed: at least 1"),
    ],
    ids=str,
)
def test_impossible_context_extensions_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        YarnConfig(**changes)
    assert str(caught.value) == message


def test_the_tiny_preset_splits_over_2_4_and_8_devices():
    cfg = tiny()
    assert (cfg.num_layers, cfg.num_dense_layers) == (8, 1)
    assert (cfg.num_experts, cfg.experts_per_token) == (16, 4)
    assert (cfg.num_groups, cfg.num_kept_groups, cfg.mtp_depth) == (4, 2, 1)
    for size in (cfg.vocab_size, cfg.d_model, cfg.dense_hidden, cfg.expert_hidden, cfg.num_experts):
        assert size % 8 == 0
