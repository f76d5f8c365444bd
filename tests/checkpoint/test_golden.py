"""The same function as transformers, by committed folders and logits (`tests/golden/make.py`).

Stored as bfloat16, float32 and FP8 blocks; computed in float32, as transformers did.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.checkpoint.hf_folder import open_folder
from tests.shapes import compiled

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("deepseek_v3_bf16", "moonlight", "groups_tied", "kimi_k2_fp8")
TOLERANCE = 2e-4  # on logits of unit variance


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str):
    model = dsv3_jax.load_pretrained(GOLDEN / name, dtype=np.float32, progress=False)
    expected = np.load(GOLDEN / name / "expected.npz")

    @compiled
    def logits(tokens_BT: jax.Array) -> dict[str, jax.Array]:
        h_BTD, _ = model.hidden(tokens_BT)
        found = {"logits": model.logits(h_BTD)}
        if model.cfg.mtp_depth:
            mtp_BTD, _ = model.mtp_hidden(h_BTD, tokens_BT)[0]
            found["mtp_logits"] = model.logits(mtp_BTD)[:, :-1]
        return found

    found = logits(expected["tokens"])
    assert found.keys() | {"tokens"} == set(expected)
    for what, ours in found.items():
        assert 0.7 < expected[what].std() < 1.4, "not at unit scale"
        assert ours.shape == expected[what].shape
        assert np.abs(ours - expected[what]).max() <= TOLERANCE, what


def test_the_folders_cover_what_is_stored_in_different_ways():
    """All dtypes of linears, with and without a latent query, a head of its own and MTP."""
    folders = [open_folder(GOLDEN / name) for name in NAMES]
    names = [set(folder.tensors) for folder in folders]
    stored = {str(folder.tensors["model.layers.0.mlp.up_proj.weight"].spec) for folder in folders}
    assert {text.split()[0] for text in stored} == {"BF16", "F32", "F8_E4M3"}
    for some in ("lm_head.weight", "q_proj.weight", "eh_proj.weight", "kv_b_proj.weight_scale_inv"):
        has = [any(name.endswith(some) for name in found) for found in names]
        assert set(has) == {True, False}, some


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_back_tensor_by_tensor(name: str, tmp_path: Path):
    fp8 = name.endswith("fp8")
    model = dsv3_jax.load_pretrained(GOLDEN / name, keep_fp8=fp8, progress=False)
    dsv3_jax.save_pretrained(model, tmp_path / "back", fp8=fp8, progress=False)
    given, back = open_folder(GOLDEN / name), open_folder(tmp_path / "back")
    assert back.model_config() == given.model_config()
    assert back.tensors.keys() == given.tensors.keys()
    for tensor_name, tensor in given.tensors.items():
        assert back.tensors[tensor_name].spec == tensor.spec, tensor_name
        assert back.tensors[tensor_name].read().tobytes() == tensor.read().tobytes(), tensor_name
