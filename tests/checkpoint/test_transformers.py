"""The same function as transformers' `DeepseekV3ForCausalLM`, from its folders and back.

Live: random models over the family, where torch and transformers can be imported, and skipped
elsewhere. `test_golden.py` proves the same from committed files.
"""

import importlib
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.model.transformer import DeepSeekV3
from tests.checkpoint.transformers_family import FAMILY
from tests.shapes import compiled

pytestmark = pytest.mark.slow

TOLERANCE = 2e-4  # on logits of unit variance, float32
MARGIN = 3e-5  # of routing decisions; float32 leaves the scores about 1e-6


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """Transformers' side, imported where it can be, and only for these tests."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return importlib.import_module("tests.checkpoint.transformers_models")


def load(folder: Path, **how) -> DeepSeekV3:
    return dsv3_jax.load_pretrained(folder, progress=False, **how)


def logits_of(model: DeepSeekV3, tokens_BT: np.ndarray) -> np.ndarray:
    return np.asarray(compiled(model)(tokens_BT))


def assert_parity(ours: np.ndarray, expected: np.ndarray) -> None:
    assert 0.7 < expected.std() < 1.4, "not at unit scale"
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in ("MTP", "blocks")])
def test_logits_agree_and_the_way_back_is_exact(theirs: ModuleType, tmp_path: Path, name: str):
    model = theirs.make_model(name)
    tokens = theirs.make_tokens(model)
    assert theirs.routing_margin(model, tokens) > MARGIN
    expected = theirs.logits_of(model, tokens)
    ours = load(theirs.save(tmp_path / "theirs", model))
    assert_parity(logits_of(ours, tokens), expected)

    dsv3_jax.save_pretrained(ours, tmp_path / "ours", progress=False)
    back, said = theirs.load(tmp_path / "ours")
    assert not any(said.values()), said
    np.testing.assert_array_equal(theirs.logits_of(back, tokens), expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_without_shared_experts_only_tensors_without_elements_are_left_out(
    theirs: ModuleType, tmp_path: Path
):
    model = theirs.make_model("DeepSeek-V3", n_shared_experts=0)
    tokens = theirs.make_tokens(model)
    expected = theirs.logits_of(model, tokens)
    ours = load(theirs.save(tmp_path / "theirs", model))
    assert_parity(logits_of(ours, tokens), expected)

    dsv3_jax.save_pretrained(ours, tmp_path / "ours", progress=False)
    back, said = theirs.load(tmp_path / "ours")
    empty = {name for name, tensor in back.state_dict().items() if not tensor.numel()}
    assert empty
    assert said.pop("missing_keys") == empty
    assert not any(said.values()), said
    np.testing.assert_array_equal(theirs.logits_of(back, tokens), expected)


@pytest.mark.parametrize("scale", ["float32", "pow2"])
def test_fp8_blocks_mean_the_same_to_both(theirs: ModuleType, tmp_path: Path, scale: str):
    """Ours written, theirs expanded by transformers itself."""
    pytest.importorskip("accelerate")  # which transformers wants for FP8
    source = theirs.save(tmp_path / "plain", theirs.make_model("blocks"))
    dsv3_jax.save_pretrained(load(source), tmp_path / "fp8", fp8=True, scale=scale, progress=False)
    model, said = theirs.load_expanded(tmp_path / "fp8")
    assert not any(said.values()), said
    tokens = theirs.make_tokens(model)
    assert theirs.routing_margin(model, tokens) > MARGIN
    ours = load(tmp_path / "fp8", dtype=np.float32)
    assert_parity(logits_of(ours, tokens), theirs.logits_of(model, tokens))


def test_the_mtp_module_is_the_one_that_transformers_drafts_with(
    theirs: ModuleType, tmp_path: Path
):
    """Order of the two halves and the hidden state that enters, which the report leaves open."""
    model = theirs.make_model("MTP")
    folder = theirs.save(tmp_path / "theirs", model, theirs.mtp_tensors(model))
    model, said = theirs.load(folder)
    assert not any(said.values()), said
    tokens = theirs.make_tokens(model)
    assert theirs.routing_margin(model, tokens) > MARGIN
    ours = load(folder)

    @compiled
    def both(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        h_BTD, _ = ours.hidden(tokens_BT)
        mtp_BTD, _ = ours.mtp_hidden(h_BTD, tokens_BT)[0]
        return ours.logits(h_BTD), ours.logits(mtp_BTD)[:, :-1]

    main, mtp = map(np.asarray, both(tokens))
    assert_parity(main, theirs.logits_of(model, tokens))
    expected = theirs.mtp_logits(model, tokens)
    assert_parity(mtp, expected)

    dsv3_jax.save_pretrained(ours, tmp_path / "ours", progress=False)
    back, said = theirs.load(tmp_path / "ours")
    assert not any(said.values()), said
    np.testing.assert_array_equal(theirs.mtp_logits(back, tokens), expected)


def test_a_folder_of_transformers_lacks_the_mtp_layer_its_config_names(
    theirs: ModuleType, tmp_path: Path
):
    """Transformers drops MTP tensors and keeps the field."""
    model = theirs.make_model("DeepSeek-V3", num_nextn_predict_layers=1)
    folder = theirs.save(tmp_path / "theirs", model)
    with pytest.raises(ValueError, match=r"there is no tensor model\.layers\.3\.\*; --skip-mtp"):
        load(folder)
    assert load(folder, skip_mtp=True).cfg.mtp_depth == 0


def test_mtp_tensors_at_another_depth_than_61_are_named_by_transformers_and_left_alone(
    theirs: ModuleType, tmp_path: Path
):
    model = theirs.make_model("DeepSeek-V3", num_nextn_predict_layers=1)
    ours = load(theirs.save(tmp_path / "theirs", model, theirs.mtp_tensors(model)))
    dsv3_jax.save_pretrained(ours, tmp_path / "ours", progress=False)
    back, said = theirs.load(tmp_path / "ours")
    unexpected = said.pop("unexpected_keys")
    assert unexpected
    assert all(name.startswith("model.layers.3.") for name in unexpected)
    assert not any(said.values()), said
    tokens = theirs.make_tokens(model)
    np.testing.assert_array_equal(theirs.logits_of(back, tokens), theirs.logits_of(model, tokens))
