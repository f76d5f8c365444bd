"""Floating-point operations of training, in closed form (what Table 1 of the report rests on).

Counted are matrix products: in the forward pass two operations for each parameter a token meets,
and attention's scores and weighted sums; in the backward pass twice as many. DeepSeek's published
250 GFLOPs per token of V3 takes every activated parameter but the embedding table, norm gains and
router biases (0.003% of them) included, and so does this count. Recomputation is left out: it is
no useful work.
"""

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.products import items_of, scores_flops


def train_flops_per_token(
    model: ModelConfig, length: int, causal: bool = True, mtp: bool = True
) -> int:
    """FLOPs of forward and backward per token, in rows of `length` tokens.

    `causal` counts the half of the scores that is not masked; without it the whole square, as some
    publications do. `mtp` adds the MTP modules, each with its pass through the head.
    """
    layers = model.num_layers
    parameters = model.param_count().activated_no_embedding
    if mtp:
        layers += model.mtp_depth
        parameters += _activated_by_mtp(model)
    scores_and_values = model.num_heads * (model.nope_dim + model.rope_dim + model.v_dim)
    attention = layers * 2 * length * scores_and_values // (2 if causal else 1)
    return 3 * (2 * parameters + attention)


def _activated_by_mtp(model: ModelConfig) -> int:
    """Parameters a token meets in all MTP modules, the shared head once in each."""
    expert = 3 * model.d_model * model.expert_hidden
    idle = (model.num_experts - model.experts_per_token) * expert
    head = model.vocab_size * model.d_model
    return model.param_count().mtp + model.mtp_depth * (head - idle)


def item_costs(model: ModelConfig, length: int) -> list[float]:
    """FLOPs per token of the forward pass of what pipelines cut a model into: embedding, every
    layer, head, every MTP module with its pass through the head; in rows of `length` tokens.
    """
    scores = scores_flops(model, length)
    # To look rows up is a copy of d numbers.
    return [
        float(sum(p.flops for p in item.products) + scores * item.attends or 2 * model.d_model)
        for item in items_of(model)
    ]
