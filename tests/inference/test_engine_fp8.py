"""FP8 in an engine, in the cache or in the weights, is what it is in the model alone."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from dsv3_jax.config import YarnConfig
from dsv3_jax.inference.cache import FP8_BLOCK
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.model.mla import MLA
from dsv3_jax.quant.fp8 import Blocked, quantize
from tests.checkpoint.hf_folders import load, random_tensors, write_folder
from tests.inference.engines import MODEL, check_texts, play, random_requests
from tests.shapes import random_model

pytestmark = pytest.mark.slow


def test_an_fp8_cache_gives_the_texts_of_a_model_whose_latents_are_rounded(monkeypatch):
    """However prompts are cut into chunks, and with drafts."""
    model = random_model(MODEL)
    settings = EngineConfig(
        rows=4, page_slots=4, pages=30, chunk=4, drafts=1, fp8_cache=True, share_prefixes=True
    )
    engine = Engine(lay_out(model, drafts=1), settings)
    told = play(engine, random_requests(MODEL, 16, seed=4))
    exact = MLA.latents

    def rounded(self, x_BTD, rope_BTR):
        c_kv_BTC, k_rope_BTR = exact(self, x_BTD, rope_BTR)
        return quantize(c_kv_BTC, FP8_BLOCK).dequantize(c_kv_BTC.dtype), k_rope_BTR

    with pytest.raises(AssertionError):
        check_texts(model, told)
    monkeypatch.setattr(MLA, "latents", rounded)
    # A latent near the middle of two numbers of 8 bits may be rounded to the other one.
    assert check_texts(random_model(MODEL), told, tolerance=1e-2) <= 1


def test_fp8_weights_give_the_texts_of_the_model_with_their_expansion(tmp_path: Path):
    unset = {"init_std": 0.006, "yarn": YarnConfig(factor=1.0)}  # in a config.json
    cfg = replace(MODEL, mtp_depth=1, **unset)
    folder = write_folder(tmp_path, cfg, random_tensors(cfg, fp8=True))
    weights = lay_out(load(folder, dtype=jnp.float32, keep_fp8=True), drafts=1)
    for layer in (weights.layers[0], weights.depths[0].layer):
        assert isinstance(layer.block.moe.w_gate_EDF[...], Blocked)
    settings = EngineConfig(rows=4, page_slots=8, chunk=16, drafts=1)
    told = play(Engine(weights, settings), random_requests(cfg, 12, seed=6))
    assert check_texts(load(folder, dtype=jnp.float32), told) == 0
