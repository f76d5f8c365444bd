"""The `config.json` of every release we cover: what each says that DeepSeek-V3's does not."""

import json
from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.config.presets import NO_YARN, PRESETS
from tests.config.hf_releases import RELEASES

V3_LONG = replace(PRESETS["dsv3_671b"](), max_length=163840)
EXPECTED = {
    "DeepSeek-V3": V3_LONG,
    "DeepSeek-R1": V3_LONG,
    "DeepSeek-V3.1": V3_LONG,
    "Moonlight-16B-A3B-Instruct": PRESETS["moonlight_16b"](),
    "Kimi-K2-Base": replace(PRESETS["kimi_k2"](), eos_id=163585),
    "Kimi-K2-Instruct-0905": replace(
        PRESETS["kimi_k2"](),
        max_length=262144,
        yarn=YarnConfig(factor=64.0, beta_fast=1.0),
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_read_and_survives_the_way_back(name: str):
    cfg = ModelConfig.from_hf(RELEASES[name])
    assert cfg == EXPECTED[name]
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


@pytest.mark.parametrize("name", RELEASES)
def test_what_we_write_of_a_release_is_what_it_said(name: str):
    written, read = ModelConfig.from_hf(RELEASES[name]).to_hf(), RELEASES[name]
    for field in set(written) & set(read) - {"model_type"}:
        assert written[field] == read[field], field


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("deepseek_v2", {"scoring_func": "softmax"}),
        ("deepseek_v32", {"index_topk": 2048}),
        ("kimi_k25", {"text_config": {}}),
    ],
)
def test_a_relative_of_another_architecture_is_refused_by_its_type(model_type: str, changes: dict):
    with pytest.raises(ValueError, match=f"config.json: model_type is '{model_type}'; supported:"):
        ModelConfig.from_hf(RELEASES["DeepSeek-V3"] | changes | {"model_type": model_type})


def test_yarn_is_where_the_release_has_it():
    active = {name: ModelConfig.from_hf(hf).yarn_active for name, hf in RELEASES.items()}
    assert [name for name, is_active in active.items() if not is_active] == [
        "Moonlight-16B-A3B-Instruct"
    ]
    assert ModelConfig.from_hf(RELEASES["Moonlight-16B-A3B-Instruct"]).yarn == NO_YARN
