"""Hugging Face folders to models and back: every bit, every layout, memory; one line for the rest.

A folder is made by hand (`hf_folders`); the model that it should give is written out here too.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dsv3_jax
from dsv3_jax.checkpoint import hf, hf_writing, new_folder
from dsv3_jax.checkpoint.hf import load_pretrained, save_pretrained
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.checkpoint.hf_writing import Writing
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quant.fp8 import WEIGHT_BLOCK, Blocked, quantize
from tests.checkpoint.hf_folders import (
    BF16,
    F32,
    FAMILY,
    FP8,
    RAGGED,
    SMALL,
    assert_same_tensors,
    expanded,
    load,
    random_bits,
    random_tensors,
    save,
    write_folder,
)
from tests.runs import jax_option

SMALL_TENSORS = random_tensors(SMALL, fp8=True)
MTP_EMBED = "model.layers.3.embed_tokens.weight"
MTP_HEAD = "model.layers.3.shared_head.head.weight"


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Programs that move a tensor need no optimisation here."""
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], DeepSeekV3]:
    """Random bits in every tensor, weights and scales in different files; the model of them."""
    tensors = random_bits(RAGGED)
    path = write_folder(tmp_path_factory.mktemp("hf") / "bits", RAGGED, tensors, files=3)
    with jax_option("jax_disable_most_optimizations"):
        return tensors, load(path, keep_fp8=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In FP8."""
    return write_folder(tmp_path_factory.mktemp("hf") / "fp8", SMALL, SMALL_TENSORS, files=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> DeepSeekV3:
    """Of `folder`, expanded to float32."""
    with jax_option("jax_disable_most_optimizations"):
        return load(folder, dtype="float32")


# --- exactness ---


@pytest.mark.parametrize("shard_size", [10**9, 200_000])
def test_fp8_in_fp8_out_is_the_same_to_the_bit(tmp_path: Path, bits, shard_size: int):
    """Values, scales, names, dtypes and MTP."""
    tensors, model = bits
    assert model.cfg == RAGGED
    assert_same_tensors(save(model, tmp_path / "out", fp8=True, shard_size=shard_size), tensors)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 5) == (shard_size < 10**9)
    assert all(file.stat().st_size < shard_size + 2**16 for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("changes", FAMILY, ids=lambda changes: ", ".join(changes))
def test_every_member_of_the_family_comes_back(tmp_path: Path, changes: dict, fp8: bool):
    cfg = replace(RAGGED, d_model=140, **changes)
    tensors = random_tensors(cfg, fp8=fp8)
    model = load(write_folder(tmp_path / "in", cfg, tensors), keep_fp8=True)
    assert model.cfg == cfg
    assert_same_tensors(save(model, tmp_path / "out", fp8=fp8), tensors)
    assert open_folder(tmp_path / "out").model_config() == cfg


def test_each_tensor_sits_where_the_model_reads_it(bits):
    """Transposed, in the stack of its layer, at its expert."""
    tensors, model = bits

    def same(actual: jax.Array | Blocked, name: str, turn: bool = True) -> None:
        expected = tensors[f"{name}.weight"]
        if isinstance(actual, Blocked):
            scales = tensors[f"{name}.weight_scale_inv"]
            assert np.array_equal(actual.scales, scales.T), name
            actual, expected = (np.asarray(x).view(np.uint8) for x in (actual.values, expected))
        assert np.array_equal(np.asarray(actual), expected.T if turn else expected), name

    same(model.embed_VD[...], "model.embed_tokens", turn=False)
    same(model.head_DV[...], "lm_head")
    same(model.norm_D[...], "model.norm", turn=False)
    same(model.dense_layers.dense.w_up_DF[0], "model.layers.0.mlp.up_proj")
    block = model.moe_layers
    for i in (0, 1):
        layer = f"model.layers.{i + 1}"
        same(block.mla.w_dkv_D_CR[i], f"{layer}.self_attn.kv_a_proj_with_mqa")
        same(block.mla.w_uq_Q_HNR[i], f"{layer}.self_attn.q_b_proj")
        same(block.mla.q_norm_Q[i], f"{layer}.self_attn.q_a_layernorm", turn=False)
        same(block.ffn_norm_D[i], f"{layer}.post_attention_layernorm", turn=False)
        same(block.moe.router.w_DE[i], f"{layer}.mlp.gate")
        same(block.moe.w_down_EFD[i, 3], f"{layer}.mlp.experts.3.down_proj")
        same(block.moe.w_gate_EDF[i, 2], f"{layer}.mlp.experts.2.gate_proj")
        bias = tensors[f"{layer}.mlp.gate.e_score_correction_bias"]
        assert np.array_equal(block.moe.router.bias_E[i], bias)
    mtp = model.mtp[0]
    same(mtp.w_proj_DD_D[...], "model.layers.3.eh_proj")
    same(mtp.embed_norm_D[...], "model.layers.3.enorm", turn=False)
    same(mtp.hidden_norm_D[...], "model.layers.3.hnorm", turn=False)
    same(mtp.norm_D[...], "model.layers.3.shared_head.norm", turn=False)
    same(mtp.block.moe.shared.w_gate_DF[...], "model.layers.3.mlp.shared_experts.gate_proj")
    weights = (v.get_value() for _, v in nnx.to_flat_state(nnx.split(model)[1]))
    assert sum(isinstance(weight, Blocked) for weight in weights) == 8 + 11 + 11


@pytest.mark.parametrize("dtype", [BF16, F32, np.dtype(np.float16)], ids=str)
def test_plain_sources_keep_their_dtype(tmp_path: Path, dtype: np.dtype):
    tensors = random_tensors(SMALL, fp8=False, dtype=dtype)
    model = load(write_folder(tmp_path / "in", SMALL, tensors))
    assert_same_tensors(save(model, tmp_path / "out"), tensors)
    named = json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
    assert named == dtype.name


def test_fp8_is_expanded_to_the_dtype_that_is_asked_for(tmp_path: Path, folder: Path, model):
    assert_same_tensors(save(load(folder), tmp_path / "bf16"), expanded(SMALL_TENSORS))
    wide = {n: x.astype(F32) for n, x in expanded(SMALL_TENSORS, F32).items()}
    assert_same_tensors(save(model, tmp_path / "f32"), wide)
    kept = save(load(folder, keep_fp8=True), tmp_path / "kept")
    assert_same_tensors(kept, expanded(SMALL_TENSORS))
    narrow = {n: x.astype(BF16) for n, x in wide.items()}
    assert_same_tensors(save(model, tmp_path / "narrow", dtype="bfloat16"), narrow)


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_the_routers_bias_is_float32_whatever_the_dtype(bits, dtype):
    assert {str(b.dtype) for b in biases_of(bits[1])} == {"float32"}
    specs = Writing(bits[1], fp8=False, dtype=dtype).specs
    named = [spec.dtype for name, spec in specs.items() if name.endswith("correction_bias")]
    assert named == [F32] * 3


def biases_of(model: DeepSeekV3) -> list[jax.Array]:
    return jax.tree.leaves(nnx.split(model, RouterBias, ...)[1])


def test_layers_of_different_dtypes_share_one_that_holds_both(tmp_path: Path):
    cfg = replace(SMALL, num_layers=2, num_dense_layers=2)
    tensors, name = random_tensors(cfg, fp8=False), "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].astype(F32) * F32.type(1.001)
    model = load(write_folder(tmp_path / "in", cfg, tensors))
    assert model.dense_layers.mla.w_o_HU_D.dtype == F32
    assert model.dense_layers.mla.w_dq_DQ.dtype == BF16
    assert np.array_equal(model.dense_layers.mla.w_o_HU_D[1].T, tensors[name])


@pytest.mark.parametrize("scale", ["float32", "pow2"])
def test_plain_weights_are_quantised_in_the_released_layout(tmp_path: Path, model, scale: str):
    """Names, dtypes and shapes of a release; values within half a step of E4M3."""
    written = save(model, tmp_path / "out", fp8=True, dtype="bfloat16", scale=scale)
    assert {n: (x.dtype, x.shape) for n, x in written.items()} == {
        n: (x.dtype, x.shape) for n, x in SMALL_TENSORS.items()
    }
    before, after = expanded(SMALL_TENSORS, F32), expanded(written, F32)
    for name in (n for n, x in written.items() if x.dtype == FP8):
        error = np.abs(after[name] - before[name])
        assert (error <= np.abs(before[name]) / 16 + np.abs(before[name]).max() * 2**-17).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    } | ({"scale_fmt": "ue8m0"} if scale == "pow2" else {})


@pytest.mark.parametrize("shard_size", [1, 10**9], ids=["values first", "scales first"])
def test_each_weight_is_quantised_once(tmp_path: Path, model, shard_size: int, monkeypatch):
    """Whichever of its two tensors is written first."""
    found, scales_of = [], hf_writing._scales
    monkeypatch.setattr(
        hf_writing, "_scales", lambda x, scale: found.append(x.shape) or scales_of(x, scale=scale)
    )
    written = save(model, tmp_path / "out", fp8=True, shard_size=shard_size)
    assert len(found) == sum(x.dtype == FP8 for x in written.values())
    name = "model.layers.0.self_attn.o_proj.weight"
    direct = jax.jit(lambda x: quantize(x, WEIGHT_BLOCK))(model.dense_layers.mla.w_o_HU_D[0])
    for x, expected in ((name, direct.values), (f"{name}_scale_inv", direct.scales)):
        assert written[x].tobytes() == np.asarray(expected).T.tobytes()


# --- memory ---


def test_a_stack_is_filled_in_place_slice_by_slice(tmp_path: Path, bits, monkeypatch):
    """Each tensor goes into the memory that its stack was given first."""
    placed, places = hf.placed, {}

    def watched(stack, x, index, transposed):
        before = [part.unsafe_buffer_pointer() for part in jax.tree.leaves(stack)]
        stack = placed(stack, x, index, transposed)
        after = [part.unsafe_buffer_pointer() for part in jax.tree.leaves(stack)]
        assert after == before
        places.setdefault(after[0], []).append(index)
        return stack

    monkeypatch.setattr(hf, "placed", watched)
    load(write_folder(tmp_path / "in", RAGGED, bits[0]), keep_fp8=True)
    experts = [place for place in places.values() if len(place[0]) == 2]
    assert [len(set(place)) for place in experts] == [2 * RAGGED.num_experts] * 3


# --- choices of the caller ---


def test_mtp_may_be_skipped_whether_it_is_there_or_not(tmp_path: Path):
    cfg = replace(SMALL, mtp_depth=1)
    tensors = random_tensors(cfg, fp8=True)
    whole = write_folder(tmp_path / "whole", cfg, tensors)
    main = {name: x for name, x in tensors.items() if ".layers.1." not in name}
    without = write_folder(tmp_path / "without", cfg, main)
    with pytest.raises(
        ValueError, match=r"num_nextn_predict_layers 1, but .*layers\.1\.\*; .*skip"
    ):
        load(without)
    for source in (without, whole):
        model = load(source, keep_fp8=True, skip_mtp=True)
        assert model.cfg == SMALL
        assert_same_tensors(save(model, tmp_path / "out", fp8=True, overwrite=True), main)


def test_copies_and_derived_buffers_may_be_absent_or_present(tmp_path: Path):
    cfg = replace(SMALL, tied_head=True)
    tensors = random_tensors(cfg, fp8=True)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, F32),
    }
    model = load(write_folder(tmp_path / "in", cfg, tensors | extra), keep_fp8=True)
    assert_same_tensors(save(model, tmp_path / "out", fp8=True), tensors)


def test_mtps_copies_need_not_be_stored(tmp_path: Path, bits):
    fewer = {n: x for n, x in bits[0].items() if n not in (MTP_EMBED, MTP_HEAD)}
    model = load(write_folder(tmp_path / "in", RAGGED, fewer), keep_fp8=True)
    specs = Writing(model, fp8=True, dtype=None).specs
    assert {MTP_EMBED, MTP_HEAD} <= specs.keys() == bits[0].keys()


def test_tokenizer_files_are_copied_on_demand(tmp_path: Path, model: DeepSeekV3):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("not a tokenizer")
    save(model, tmp_path / "out", tokenizer_from=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_public_names_are_these():
    assert dsv3_jax.load_pretrained is load_pretrained
    assert dsv3_jax.save_pretrained is save_pretrained


# --- writing in the way of others ---


def nothing_else(parent: Path, *names: str) -> bool:
    return sorted(path.name for path in parent.iterdir()) == sorted(names)


def test_a_model_is_replaced_only_on_demand_and_whole(tmp_path: Path, model: DeepSeekV3):
    out = tmp_path / "out"
    save(model, out, shard_size=200_000)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="out holds a model already"):
        save(model, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    save(model, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert nothing_else(tmp_path, "out")


def test_other_peoples_files_are_never_replaced(tmp_path: Path, model: DeepSeekV3):
    out = tmp_path / "out"
    out.mkdir()
    save(model, out)  # an empty folder is nobody's
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file; allowed: a new folder"):
        save(model, tmp_path / "file", overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes holds a\.txt and no model"):
        save(model, tmp_path / "notes", overwrite=True)
    assert nothing_else(tmp_path, "file", "notes", "out")


def test_a_small_disk_is_told_before_anything_is_written(tmp_path: Path, model, monkeypatch):
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: type("", (), {"free": 10**6}))
    with pytest.raises(OSError, match=r"not enough disk for 0\.00 GB: 0\.00 GB free in"):
        save(model, tmp_path / "out")
    assert nothing_else(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing_half_written(tmp_path: Path, model, monkeypatch, overwrite):
    """The disk fills up in the second shard; what stood there before stands there still."""
    out = tmp_path / "out"
    if overwrite:
        save(model, out)
    write, written = hf.write_file, []

    def full(file: Path, *args) -> None:
        written.append(file)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(file, *args)

    monkeypatch.setattr(hf, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, out, shard_size=200_000, overwrite=overwrite)
    assert len(written) == 2
    assert nothing_else(tmp_path, *(["out"] if overwrite else []))
    if overwrite:
        assert (out / "model.safetensors").exists()


def test_a_model_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, model, monkeypatch):
    """Without an exchange of names, the old folder has stepped aside already when the new one
    cannot take its name.
    """
    monkeypatch.setattr(new_folder, "exchange", lambda one, other: False)
    out, rename, renamed = tmp_path / "out", os.rename, []
    save(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def second_fails(one: Path, two: Path) -> None:
        renamed.append(two)
        if len(renamed) == 2:
            raise OSError(5, "Input/output error")
        rename(one, two)

    monkeypatch.setattr(new_folder.os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        save(model, out, fp8=True, overwrite=True)
    assert len(renamed) == 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert nothing_else(tmp_path, "out")
