"""Hugging Face `config.json` in and out: a table of names, and the values we insist on."""

from typing import Any

from dsv3_jax.config.model import ModelConfig, YarnConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_latent",
    "kv_lora_rank": "kv_latent",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "v_dim",
    "intermediate_size": "dense_hidden",
    "moe_intermediate_size": "expert_hidden",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "n_group": "num_groups",
    "topk_group": "num_kept_groups",
    "routed_scaling_factor": "gate_scale",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "rms_eps",
}
OPTIONAL = {
    "num_nextn_predict_layers": ("mtp_depth", 0),
    "tie_word_embeddings": ("tied_head", False),
    "bos_token_id": ("bos_id", 0),
    "eos_token_id": ("eos_id", 1),
}
REQUIRED_VALUES = {
    "model_type": ("deepseek_v3", "kimi_k2"),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_interleave": (True,),
    "pretraining_tp": (1,),
}
ROPE_FIELDS = frozenset(
    "type rope_type rope_theta factor beta_fast beta_slow mscale mscale_all_dim "
    "original_max_position_embeddings".split()
)
# No effect on the function computed, or redundant with a field above.
INERT = frozenset(
    "_name_or_path architectures auto_map aux_loss_alpha chunk_size_feed_forward dtype ep_size "
    "head_dim id2label initializer_range is_encoder_decoder label2id num_key_value_heads "
    "output_attentions output_hidden_states pad_token_id problem_type qk_head_dim "
    "quantization_config return_dict rope_parameters rope_scaling rope_theta seq_aux torch_dtype "
    "transformers_version unsloth_fixed use_cache".split()
)


def model_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed `config.json`; ValueError for what cannot be honoured."""
    missing = sorted(set(FIELDS) - set(hf))
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    known = set(FIELDS) | set(OPTIONAL) | set(REQUIRED_VALUES) | INERT
    unknown = sorted(set(hf) - known)
    if unknown:
        raise ValueError(f"config.json has fields this model does not know: {', '.join(unknown)}")
    for name, allowed in REQUIRED_VALUES.items():
        if hf.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json: {name} is {hf[name]!r}; supported: {' or '.join(map(repr, allowed))}"
            )
    heads, kv_heads = hf["num_attention_heads"], hf.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads is {kv_heads}; supported: {heads}, as many as heads"
        )
    values = {ours: hf[theirs] for theirs, ours in FIELDS.items()}
    for theirs, (ours, default) in OPTIONAL.items():
        value = hf.get(theirs)
        values[ours] = default if value is None else value
    return ModelConfig(**values, **_rope_from_hf(hf))


def _rope_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """From `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` for both."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "yarn": YarnConfig(factor=1.0)}
    if kind != "yarn":
        raise ValueError(f"config.json: rope scaling type is {kind!r}; supported: 'yarn' or none")
    if "factor" not in rope:
        raise ValueError("config.json: rope_scaling lacks factor")
    unknown = sorted(set(rope) - ROPE_FIELDS)
    if unknown:
        raise ValueError(f"config.json: rope scaling has unsupported {', '.join(unknown)}")
    defaults = YarnConfig()
    yarn = YarnConfig(
        factor=rope["factor"],
        beta_fast=rope.get("beta_fast", defaults.beta_fast),
        beta_slow=rope.get("beta_slow", defaults.beta_slow),
        mscale=rope.get("mscale", defaults.mscale),
        mscale_all_dim=rope.get("mscale_all_dim", 0.0),
        original_length=rope.get("original_max_position_embeddings", defaults.original_length),
    )
    if hf["max_position_embeddings"] <= yarn.original_length:
        raise ValueError(
            f"config.json: max_position_embeddings is {hf['max_position_embeddings']} with YaRN "
            f"over {yarn.original_length} original positions; supported: more, or no rope scaling"
        )
    return {"rope_theta": theta, "yarn": yarn}


def model_to_hf(model: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model; YaRN is written only where it is active."""
    hf = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    hf |= {theirs: getattr(model, ours) for theirs, ours in FIELDS.items()}
    hf |= {theirs: getattr(model, ours) for theirs, (ours, _) in OPTIONAL.items()}
    hf |= {name: allowed[0] for name, allowed in REQUIRED_VALUES.items() if name != "model_type"}
    yarn = model.yarn
    scaling = {
        "type": "yarn",
        "factor": yarn.factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "original_max_position_embeddings": yarn.original_length,
    }
    return hf | {
        "num_key_value_heads": model.num_heads,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if model.yarn_active else None,
        "torch_dtype": "bfloat16",
    }
