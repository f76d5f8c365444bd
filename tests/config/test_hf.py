"""Hugging Face `config.json`: the released one, the round trip, and what is refused."""

import json
from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.config.presets import PRESETS, dsv3_671b
from tests.shapes import TINY_YARN, tiny_model

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "ep_size": 1,
    "pretraining_tp": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


def without(*names: str) -> dict:
    return {name: value for name, value in RELEASED.items() if name not in names}


def test_the_released_config_is_the_preset_with_active_yarn():
    cfg = ModelConfig.from_hf(RELEASED)
    assert cfg == replace(dsv3_671b(), max_length=163840)
    assert cfg.yarn == YarnConfig()
    assert cfg.yarn_active
    assert cfg.init_std == 0.006  # not initializer_range


VARIANTS = {name: preset() for name, preset in PRESETS.items()} | {
    "extended": tiny_model(yarn=TINY_YARN),
    "tied, direct query, two depths": tiny_model(tied_head=True, q_latent=None, mtp_depth=2),
    "released, extended": ModelConfig(max_length=163840),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_keeps_the_function_computed(cfg: ModelConfig):
    """What training alone uses is not in the file: the initial deviation of the weights."""
    hf = json.loads(json.dumps(cfg.to_hf()))
    back = ModelConfig.from_hf(hf)
    assert replace(back, yarn=cfg.yarn, init_std=cfg.init_std) == cfg
    assert back.yarn_active == cfg.yarn_active
    if cfg.yarn_active:
        assert back.yarn == cfg.yarn
    assert back.to_hf() == cfg.to_hf()


def test_what_we_write_names_the_fields_of_the_released_config():
    written = ModelConfig.from_hf(RELEASED).to_hf()
    training_only = {"aux_loss_alpha", "seq_aux", "initializer_range", "ep_size"}
    assert set(RELEASED) - set(written) <= training_only | {"quantization_config"}
    for name in set(written) & set(RELEASED):
        assert written[name] == RELEASED[name], name


def test_rope_parameters_of_transformers_5_are_read():
    parameters = RELEASED["rope_scaling"] | {"rope_theta": 10000.0, "rope_type": "yarn"}
    newer = without("rope_theta", "rope_scaling") | {"rope_parameters": parameters}
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(RELEASED)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}])
def test_without_rope_scaling_yarn_stays_off_at_any_length(scaling: dict | None):
    cfg = ModelConfig.from_hf(RELEASED | {"rope_scaling": scaling})
    assert cfg.max_length == 163840
    assert not cfg.yarn_active


def test_entries_that_files_may_leave_out_have_the_format_s_defaults():
    names = (
        "num_nextn_predict_layers tie_word_embeddings bos_token_id eos_token_id num_key_value_heads"
    )
    cfg = ModelConfig.from_hf(without(*names.split()))
    assert cfg == replace(ModelConfig.from_hf(RELEASED), mtp_depth=0)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (without("hidden_size", "n_group"), "config.json lacks hidden_size, n_group"),
        (
            RELEASED | {"sliding_window": 128},
            "config.json has fields this model does not know: sliding_window",
        ),
        (
            RELEASED | {"scoring_func": "softmax"},
            "config.json: scoring_func is 'softmax'; supported: 'sigmoid'",
        ),
        (
            RELEASED | {"model_type": "llama"},
            "config.json: model_type is 'llama'; supported: 'deepseek_v3' or 'kimi_k2'",
        ),
        (
            RELEASED | {"attention_bias": True},
            "config.json: attention_bias is True; supported: False",
        ),
        (
            RELEASED | {"num_key_value_heads": 8},
            "config.json: num_key_value_heads is 8; supported: 128, as many as heads",
        ),
        (
            RELEASED | {"rope_scaling": {"type": "linear", "factor": 4}},
            "config.json: rope scaling type is 'linear'; supported: 'yarn' or none",
        ),
        (
            RELEASED | {"max_position_embeddings": 4096},
            (
                "config.json: max_position_embeddings is 4096 with YaRN over 4096 original "
                "positions; supported: more, or no rope scaling"
            ),
        ),
        (
            RELEASED | {"rope_scaling": {"type": "yarn", "beta_fast": 32}},
            "config.json: rope_scaling lacks factor",
        ),
        (
            RELEASED | {"rope_scaling": RELEASED["rope_scaling"] | {"attention_factor": 0.5}},
            "config.json: rope scaling has unsupported attention_factor",
        ),
        (RELEASED | {"hidden_size": "7168"}, "model.d_model is '7168'; allowed: whole numbers"),
        (
            RELEASED | {"n_group": 7},
            "model.num_groups is 7, which does not divide num_experts = 256",
        ),
    ],
    ids=lambda x: x[:45] if isinstance(x, str) else "",
)
def test_unsupported_files_are_refused_with_one_line(hf: dict, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        ModelConfig.from_hf(hf)
    assert str(caught.value) == message
