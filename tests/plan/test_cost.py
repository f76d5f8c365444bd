"""Training FLOPs against the figures published for DeepSeek-V3 and a list of all products."""

from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.presets import dsv3_671b, moe_16b, tiny
from dsv3_jax.plan.cost import item_costs, train_flops_per_token


@pytest.mark.parametrize(
    ("causal", "mtp", "giga_flops", "last_digit"),
    [
        (True, False, 250.456, 0.001),
        (False, False, 281.158, 0.001),
        (True, True, 260.6, 0.1),
        (False, True, 291.8, 0.1),
    ],
)
def test_v3_at_4096_costs_what_is_published(causal, mtp, giga_flops, last_digit):
    flops = train_flops_per_token(dsv3_671b(), 4096, causal, mtp)
    assert flops / 1e9 == pytest.approx(giga_flops, abs=last_digit)


@pytest.mark.parametrize(("causal", "giga_flops"), [(True, 83.48), (False, 93.72)])
def test_v3_forward_is_a_third(causal, giga_flops):
    forward = train_flops_per_token(dsv3_671b(), 4096, causal, mtp=False) / 3
    assert forward / 1e9 == pytest.approx(giga_flops, abs=0.01)


def products(model: ModelConfig, length: int) -> int:
    """Multiplications per token of one forward pass, a term for each matrix, full attention."""
    d, heads = model.d_model, model.num_heads
    query = heads * (model.nope_dim + model.rope_dim)
    attention = d * query if model.q_latent is None else d * model.q_latent + model.q_latent * query
    attention += d * model.kv_latent + d * model.rope_dim
    attention += model.kv_latent * heads * model.nope_dim + model.kv_latent * heads * model.v_dim
    attention += heads * model.v_dim * d
    attention += length * query + length * heads * model.v_dim
    experts = model.experts_per_token + model.num_shared_experts
    moe = attention + d * model.num_experts + experts * 3 * d * model.expert_hidden
    dense = attention + 3 * d * model.dense_hidden
    head = d * model.vocab_size
    main = model.num_dense_layers * dense + model.num_moe_layers * moe + head
    return main + model.mtp_depth * (2 * d * d + moe + head)


def gains_and_biases(model: ModelConfig) -> int:
    """Parameters that are counted although they are in no product: RMSNorm gains, router biases."""
    d, depth = model.d_model, model.mtp_depth
    latents = model.kv_latent + (model.q_latent or 0)
    norms = (model.num_layers + depth) * (2 * d + latents) + d + depth * 3 * d
    return norms + (model.num_moe_layers + depth) * model.num_experts


@pytest.mark.parametrize(
    "model",
    [tiny(), moe_16b(), replace(tiny(), mtp_depth=2), replace(tiny(), mtp_depth=0)],
    ids=["tiny", "moe_16b", "two_mtp", "no_mtp"],
)
def test_equals_the_sum_over_every_product(model):
    flops = train_flops_per_token(model, 1000, causal=False)
    assert flops == 6 * (products(model, 1000) + gains_and_biases(model))


def test_causal_leaves_out_half_of_attention_and_nothing_else():
    model = tiny()
    head_sizes = model.num_heads * (model.nope_dim + model.rope_dim + model.v_dim)
    square = 3 * 2 * 1000 * head_sizes * (model.num_layers + model.mtp_depth)
    full = train_flops_per_token(model, 1000, causal=False)
    assert full - train_flops_per_token(model, 1000) == square // 2


def test_a_tied_head_costs_as_much_as_its_own_table():
    model = tiny()
    tied = replace(model, tied_head=True)
    assert train_flops_per_token(tied, 512) == train_flops_per_token(model, 512)


def test_without_mtp_its_depth_does_not_matter():
    deep, flat = replace(tiny(), mtp_depth=3), replace(tiny(), mtp_depth=0)
    assert train_flops_per_token(deep, 512, mtp=False) == train_flops_per_token(flat, 512)


def test_costs_of_items_add_up_to_those_of_training():
    """Three forward passes' worth; the router and MTP's projection are in both."""
    model = dsv3_671b()
    total = 3 * sum(item_costs(model, 4096)[1:])
    assert total == pytest.approx(train_flops_per_token(model, 4096), rel=2e-3)
