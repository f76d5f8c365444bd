"""The family for parity with transformers, tiny: what each member varies. Plain data."""

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 48,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 3.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
FAMILY = {
    "DeepSeek-V3": {},
    "DeepSeek-V3 extended": {"rope_parameters": _YARN, "qk_rope_head_dim": 8},
    "Moonlight": {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.446,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "rms_norm_eps": 1e-5,
    },
    "Kimi-K2": {
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 12,
        "routed_scaling_factor": 2.827,
        "rope_parameters": _YARN | {"rope_theta": 50000.0, "factor": 32.0, "beta_fast": 0.5},
    },
    "tied head, direct query": {
        "tie_word_embeddings": True,
        "q_lora_rank": None,
        "rope_parameters": _YARN,
    },
    "experts in every layer, YaRN without mscale": {
        "first_k_dense_replace": 0,
        "rope_parameters": {name: _YARN[name] for name in _YARN if not name.startswith("mscale")},
    },
    # An epsilon that is felt: transformers gives the norms on the latents 1e-6 all the same.
    "experts in no layer, large epsilon": {"first_k_dense_replace": 3, "rms_norm_eps": 0.05},
    # cos and sin are multiplied, other than in DeepSeek-V3, where the two mscales cancel.
    "YaRN with two mscales, tied head": {
        "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
        "tie_word_embeddings": True,
    },
    # Kept experts score below 0, so that the value which masks dropped groups decides.
    "three of eight groups, negative biases": {
        "n_routed_experts": 32,
        "n_group": 8,
        "topk_group": 3,
        "num_experts_per_tok": 6,
        "qk_nope_head_dim": 4,
        "v_head_dim": 10,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    # One and several blocks of 128. Transformers 5.23 divides a tensor evenly among its scales,
    # so that it cannot expand ragged blocks, such as the 576 rows of DeepSeek-V3's own kv_a_proj.
    "blocks": {
        "hidden_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "intermediate_size": 384,
        "moe_intermediate_size": 24,
    },
    # The one depth at which transformers expects MTP tensors: it ignores layer 61 by its number.
    "MTP": {"num_hidden_layers": 61, "first_k_dense_replace": 60, "num_nextn_predict_layers": 1},
}
BIAS_MEAN = {"three of eight groups, negative biases": -2.0}
