"""Hugging Face `config.json` in and out: a table of names, and the values we insist on.

Covered are DeepSeek-V3, -R1 and -V3.1, Moonlight, Kimi-K2 and what transformers'
`DeepseekV3ForCausalLM` saves. Whatever would make another function of the same weights is refused
by name; a field without effect must be listed as such.
"""

from typing import Any

from dsv3_jax.config.fields import shown
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
# null where other folders have a number: no groups, no shared expert.
NULLS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}
TABLES = ("quantization_config", "rope_parameters", "rope_scaling")
MODEL_TYPES = ("deepseek_v3", "kimi_k2")  # the same function, by Kimi-K2's own model card
REQUIRED_VALUES = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_interleave": (True,),  # pairs 2j, 2j + 1, as every release stores them
    "pretraining_tp": (1,),
}
ROPE_FIELDS = frozenset(
    "type rope_type rope_theta factor beta_fast beta_slow mscale mscale_all_dim "
    "original_max_position_embeddings".split()
)
QUANTIZATION_VALUES = {
    "quant_method": ("fp8",),
    "weight_block_size": ([128, 128],),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    # V3.1: the scales, float32 all the same, are powers of two.
    "scale_fmt": ("ue8m0", "float", None),
    "expert_dtype": ("fp8", None),
    "dequantize": (False, None),
}
# Which tensors are FP8 is read off the tensors themselves.
QUANTIZATION_INERT = frozenset("ignored_layers modules_to_convert modules_to_not_convert".split())
# Looked at elsewhere in this file.
OTHERS = frozenset(
    "model_type num_key_value_heads quantization_config rope_parameters rope_scaling "
    "rope_theta".split()
)
# No effect on the function computed, or redundant with a field above. From `add_cross_attention`
# on: what transformers 4 writes of every model, about generation and other architectures.
INERT = frozenset(
    "_attn_implementation _name_or_path architectures auto_map aux_loss_alpha dtype ep_size "
    "head_dim initializer_range output_router_logits pad_token_id qk_head_dim seq_aux torch_dtype "
    "transformers_version unsloth_fixed use_cache "
    "add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id "
    "length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type "
    "pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate "
    "sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tokenizer_class top_k top_p torchscript typical_p use_bfloat16".split()
)


def model_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed `config.json`; ValueError for what cannot be honoured.

    The model type comes first: a file of another family is not told what it lacks of this one.
    """
    _check_value("model_type", hf.get("model_type"), MODEL_TYPES)
    _check_fields(hf)
    for name, allowed in REQUIRED_VALUES.items():
        _check_value(name, hf.get(name, allowed[0]), allowed)
    heads, kv_heads = hf["num_attention_heads"], hf.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads is {shown(kv_heads)}; supported: "
            f"{shown(heads)}, as many as heads"
        )
    for name in TABLES:
        if not isinstance(hf.get(name), dict | None):
            raise ValueError(f"config.json: {name} is {shown(hf[name])}; allowed: a table or null")
    _check_groups(hf)
    _check_quantization(hf.get("quantization_config"))
    values = {ours: hf[theirs] for theirs, ours in FIELDS.items()}
    for theirs, number in NULLS.items():
        if hf[theirs] is None:
            values[FIELDS[theirs]] = number
    for theirs, (ours, default) in OPTIONAL.items():
        value = hf.get(theirs)
        if isinstance(value, list):
            raise ValueError(
                f"config.json: {theirs} is {shown(value)}; supported: one (others of a kind stand "
                "in generation_config.json)"
            )
        values[ours] = default if value is None else value
    return ModelConfig(**values, **_rope_from_hf(hf))


def _check_value(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        known = " or ".join(repr(a) for a in allowed if a is not None)
        raise ValueError(f"config.json: {name} is {shown(value)}; supported: {known}")


def _check_fields(hf: dict[str, Any]) -> None:
    missing = sorted(set(FIELDS) - set(hf))
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    unknown = sorted(set(hf) - set(FIELDS) - set(OPTIONAL) - set(REQUIRED_VALUES) - INERT - OTHERS)
    if unknown:
        raise ValueError(f"config.json has fields this model does not know: {', '.join(unknown)}")


def _check_groups(hf: dict[str, Any]) -> None:
    """How many of no groups are kept is no question, and how many of some groups is no default."""
    groups, kept = hf["n_group"], hf["topk_group"]
    for one, other in ((groups, kept), (kept, groups)):
        if one is None and other not in (None, 1):
            raise ValueError(
                f"config.json: n_group is {shown(groups)} and topk_group {shown(kept)}; "
                "supported: two numbers, or null for both"
            )


def _check_quantization(quantization: dict[str, Any] | None) -> None:
    """FP8 in blocks of 128 x 128, or nothing."""
    if quantization is None:
        return
    where = "quantization_config"
    for name, allowed in QUANTIZATION_VALUES.items():
        _check_value(f"{where}.{name}", quantization.get(name), allowed)
    unknown = sorted(set(quantization) - set(QUANTIZATION_VALUES) - QUANTIZATION_INERT)
    if unknown:
        raise ValueError(f"config.json: {where} has unsupported {', '.join(unknown)}")


def _rope_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """From `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` for both."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "yarn": YarnConfig(factor=1.0)}
    if kind != "yarn":
        raise ValueError(
            f"config.json: rope scaling type is {shown(kind)}; supported: 'yarn' or none"
        )
    for name in ("factor", "original_max_position_embeddings"):
        if name not in rope:
            raise ValueError(f"config.json: rope_scaling lacks {name}")
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
        original_length=rope["original_max_position_embeddings"],
    )
    _check_mscale(rope)
    length = hf["max_position_embeddings"]
    if isinstance(length, int) and length <= yarn.original_length:
        raise ValueError(
            f"config.json: max_position_embeddings is {length} with YaRN "
            f"over {yarn.original_length} original positions; supported: more, or no rope scaling"
        )
    return {"rope_theta": theta, "yarn": yarn}


def _check_mscale(rope: dict[str, Any]) -> None:
    """Of other pairs DeepSeek's code and transformers make different multipliers."""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale if all_dim else mscale in (None, 1)):
        raise ValueError(
            f"config.json: rope scaling has mscale {mscale} and mscale_all_dim {all_dim}, which "
            "released codes read differently; supported: both, or mscale 1 alone"
        )


def model_to_hf(model: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model; YaRN is written only where it is active.

    ValueError for what the format has no field for.
    """
    for name in ("latent_rms_eps", "masked_score"):
        value, only = getattr(model, name), getattr(ModelConfig, name)
        if value != only:
            raise ValueError(
                f"model.{name} is {value}; "
                f"allowed in a config.json, which has no such field: {only}"
            )
    hf = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": MODEL_TYPES[0]}
    hf |= {theirs: getattr(model, ours) for theirs, ours in FIELDS.items()}
    hf |= {theirs: getattr(model, ours) for theirs, (ours, _) in OPTIONAL.items()}
    hf |= {name: allowed[0] for name, allowed in REQUIRED_VALUES.items()}
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
    if model.yarn_active:
        _check_mscale(scaling)
    return hf | {
        "num_key_value_heads": model.num_heads,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if model.yarn_active else None,
        "torch_dtype": "bfloat16",
    }
