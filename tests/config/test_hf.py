"""Hugging Face `config.json`: the released one, the round trip, and what is refused."""

import json
from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.config.presets import PRESETS, dsv3_671b
from tests.config.hf_releases import RELEASES
from tests.shapes import TINY_YARN, tiny_model

RELEASED = RELEASES["DeepSeek-V3"]


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


def test_null_means_no_groups_and_no_shared_expert():
    cfg = ModelConfig.from_hf(
        RELEASED | {"n_group": None, "topk_group": None, "n_shared_experts": None}
    )
    assert (cfg.num_groups, cfg.num_kept_groups, cfg.num_shared_experts) == (1, 1, 0)


@pytest.mark.parametrize("mscale", [{}, {"mscale": 1}, {"mscale": 1, "mscale_all_dim": 0}])
def test_a_multiplier_on_which_released_codes_agree_is_read(mscale: dict):
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096} | mscale
    yarn = ModelConfig.from_hf(RELEASED | {"rope_scaling": scaling}).yarn
    assert (yarn.mscale, yarn.mscale_all_dim) == (1, 0)


def test_the_eps_of_the_latents_is_no_field_and_never_lost():
    """Released code gives these two norms their default, whatever `rms_norm_eps` is."""
    assert ModelConfig.from_hf(RELEASED | {"rms_norm_eps": 0.5}).latent_rms_eps == 1e-6
    with pytest.raises(ValueError, match=r"model\.latent_rms_eps is 1e-05; allowed in a config"):
        tiny_model(latent_rms_eps=1e-5).to_hf()
    with pytest.raises(ValueError, match=r"model\.masked_score is 0; allowed in a config"):
        tiny_model(masked_score="0").to_hf()


def test_what_we_would_misread_is_not_written():
    with pytest.raises(ValueError, match=r"mscale 0\.7 and mscale_all_dim 0"):
        tiny_model(yarn=replace(TINY_YARN, mscale=0.7, mscale_all_dim=0)).to_hf()


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
            {"model_type": "llama", "hidden_size": 4096, "mlp_bias": False},
            "config.json: model_type is 'llama'; supported: 'deepseek_v3' or 'kimi_k2'",
        ),
        (
            without("model_type"),
            "config.json: model_type is None; supported: 'deepseek_v3' or 'kimi_k2'",
        ),
        (
            RELEASED | {"rope_interleave": False},
            "config.json: rope_interleave is False; supported: True",
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
        (
            RELEASED | {"rope_scaling": {"type": "yarn", "factor": 40}},
            "config.json: rope_scaling lacks original_max_position_embeddings",
        ),
        *(
            (
                RELEASED | {"rope_scaling": RELEASED["rope_scaling"] | mscales},
                (
                    f"config.json: rope scaling has mscale {mscales['mscale']} and mscale_all_dim "
                    f"{mscales['mscale_all_dim']}, which released codes read differently; "
                    "supported: both, or mscale 1 alone"
                ),
            )
            for mscales in (
                {"mscale": 0.707, "mscale_all_dim": None},
                {"mscale": 0.707, "mscale_all_dim": 0},
                {"mscale": None, "mscale_all_dim": 1.0},
                {"mscale": 0, "mscale_all_dim": None},
            )
        ),
        (
            RELEASED | {"quantization_config": {"quant_method": "compressed-tensors"}},
            (
                "config.json: quantization_config.quant_method is 'compressed-tensors'; "
                "supported: 'fp8'"
            ),
        ),
        *(
            (
                RELEASED | {"quantization_config": RELEASED["quantization_config"] | {name: value}},
                f"config.json: quantization_config{message}",
            )
            for name, value, message in (
                ("fmt", "e5m2", ".fmt is 'e5m2'; supported: 'e4m3'"),
                ("weight_block_size", None, ".weight_block_size is None; supported: [128, 128]"),
                (
                    "weight_block_size",
                    [64, 64],
                    ".weight_block_size is [64, 64]; supported: [128, 128]",
                ),
                (
                    "activation_scheme",
                    "static",
                    ".activation_scheme is 'static'; supported: 'dynamic'",
                ),
                (
                    "scale_fmt",
                    "e8m0fnu",
                    ".scale_fmt is 'e8m0fnu'; supported: 'ue8m0' or 'float'",
                ),
                ("kv_cache_scheme", {}, " has unsupported kv_cache_scheme"),
            )
        ),
        *(
            (
                RELEASED | {name: value},
                f"config.json: {name} is {value!r}; allowed: a table or null",
            )
            for name, value in (
                ("rope_scaling", "yarn"),
                ("rope_parameters", [4]),
                ("quantization_config", "fp8"),
                ("quantization_config", False),
            )
        ),
        (
            RELEASED | {"max_position_embeddings": "4096"},
            "model.max_length is '4096'; allowed: whole numbers",
        ),
        (
            RELEASED | {"rope_theta": 10**399},
            f"model.rope_theta is 1{0:017}...{0:019}; allowed: finite numbers",
        ),
        (
            RELEASED | {"scoring_func": [[[["sigmoid"]]]] * 9},
            f"config.json: scoring_func is [{'[[[...]]], ' * 6}...]; supported: 'sigmoid'",
        ),
        *(
            (
                RELEASED | {"n_group": groups, "topk_group": kept},
                (
                    f"config.json: n_group is {groups} and topk_group {kept}; "
                    "supported: two numbers, or null for both"
                ),
            )
            for groups, kept in ((8, None), (None, 4))
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
