"""Folders that cannot be loaded: one line that names the folder, the file or tensor, the fault."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import hf_check
from tests.checkpoint.hf_folders import (
    BF16,
    F32,
    FP8,
    RAGGED,
    SMALL,
    changed,
    edit_config,
    load,
    random_tensors,
    write_folder,
)

NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate.weight"
O_PROJ = "model.layers.2.self_attn.o_proj.weight"
MTP_EMBED = "model.layers.3.embed_tokens.weight"
MTP_HEAD = "model.layers.3.shared_head.head.weight"


def drop(*names: str) -> Callable[[dict], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def swap(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def put_nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[1, 0] = np.nan
    return x


def make_plain(tensors: dict) -> None:
    """One linear of two in bfloat16."""
    tensors[O_PROJ] = tensors[O_PROJ].astype(BF16)
    del tensors[f"{O_PROJ}_scale_inv"]


FAULTS = {
    "missing": (drop(NORM, GATE), rf"lacks tensors, 2 in all: {GATE}, {NORM}"),
    "unknown": (
        lambda tensors: tensors.update({f"x.{i}": np.ones(1, F32) for i in range(7)}),
        r"has unknown tensors, 7 in all: x\.0, x\.1, x\.2, x\.3, x\.4, \.\.\.",
    ),
    "no scales": (drop(f"{O_PROJ}_scale_inv"), rf"lacks tensors, 1 in all: {O_PROJ}_scale_inv"),
    "scales without FP8": (
        swap(O_PROJ, lambda x: x.astype(BF16)),
        rf"has unknown tensors, 1 in all: {O_PROJ}_scale_inv",
    ),
    "shape": (swap(GATE, lambda x: x[:, :-1]), rf"{GATE} has shape \[4, 191\]; .* \[4, 192\]"),
    "transposed": (swap(O_PROJ, lambda x: x.T.copy()), rf"{O_PROJ} has shape \[132, 192\]"),
    "dtype": (
        swap(GATE, lambda x: x.view(np.int16)),
        rf"{GATE} has dtype I16; allowed: BF16, F16, F32$",
    ),
    "FP8 norm": (swap(NORM, lambda x: x.astype(FP8)), rf"{NORM} has dtype F8_E4M3; allowed: BF16"),
    "scale grid": (
        swap(f"{O_PROJ}_scale_inv", lambda x: x[:, :1]),
        rf"{O_PROJ}_scale_inv has shape \[2, 1\]; the model needs \[2, 2\]",
    ),
    "scale dtype": (
        swap(f"{O_PROJ}_scale_inv", lambda x: x.astype(BF16)),
        rf"{O_PROJ}_scale_inv has dtype BF16; allowed: F32",
    ),
    "NaN scale": (swap(f"{O_PROJ}_scale_inv", put_nan), rf"{O_PROJ}_scale_inv holds NaN"),
    "another embedding": (
        swap(MTP_EMBED, lambda x: x + x.dtype.type(1)),
        rf"{MTP_EMBED} \(BF16 \[64, 192\]\) differs from model\.embed_tokens\.weight",
    ),
    "another head": (
        swap(MTP_HEAD, lambda x: x[::-1].copy()),
        r"layers\.3\.shared_head\.head\.weight .* differs from lm_head\.weight",
    ),
    "no whole MTP": (drop("model.layers.3.enorm.weight"), r"lacks tensors, 1 in all: .*3\.enorm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_refused_by_name(tmp_path: Path, fault: str):
    change, message = FAULTS[fault]
    path = changed(tmp_path / "in", RAGGED, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(tmp_path / "in") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixed_stack_cannot_keep_fp8(tmp_path: Path):
    path = changed(tmp_path / "in", RAGGED, make_plain)
    with pytest.raises(
        ValueError, match=rf"layers\.1\.self_attn\.o_proj.* FP8 and {O_PROJ} is not"
    ):
        load(path, keep_fp8=True)


def test_the_configuration_decides_what_is_needed(tmp_path: Path):
    tensors = random_tensors(RAGGED, fp8=True)
    for cfg, message in (
        (replace(RAGGED, mtp_depth=0), r"unknown tensors, \d+ in all: model\.layers\.3\.eh_proj"),
        (replace(RAGGED, num_experts=6), r"lacks tensors, 18 in all: .*\.experts\.4\."),
        (replace(RAGGED, tied_head=True), r"lm_head\.weight .* differs from model\.embed_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            load(write_folder(tmp_path / "in", cfg, tensors))


def edit_index(path: Path, edit: Callable[[dict], object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, value: float):
    tensors = random_tensors(SMALL, fp8=True)
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    tensors[name] = np.full_like(tensors[name], value)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        load(write_folder(tmp_path / "in", SMALL, tensors))


def test_a_copy_that_differs_in_its_last_rows_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hf_check, "_CHUNK", 64)
    tensors = random_tensors(RAGGED, fp8=False)
    tensors[MTP_EMBED] = np.array(tensors[MTP_EMBED])
    tensors[MTP_EMBED][-1] += 1
    with pytest.raises(ValueError, match=f"{MTP_EMBED} .* differs from"):
        load(write_folder(tmp_path / "in", RAGGED, tensors))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_field_that_stands_twice_is_refused(tmp_path: Path, file: str):
    path = write_folder(tmp_path / "in", SMALL, random_tensors(SMALL, fp8=False), files=3)
    text = (path / file).read_text().strip()
    name = next(iter(json.loads(text)))
    (path / file).write_text('{"' + name + '": 1, ' + text[1:])
    with pytest.raises(ValueError, match=f"{file}: not JSON: {name} stands there twice"):
        load(path)


SECOND = "model-00002-of-00003.safetensors"


def cut(path: Path, size: int) -> None:
    content = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(content[:size] if size > 0 else content + b"x")


BROKEN = {
    "config nested": (
        lambda path: (path / "config.json").write_text("[" * 10**5),
        "config.json: not JSON: nested too deeply",
    ),
    "config a pipe": (
        lambda path: [(path / "config.json").unlink(), os.mkfifo(path / "config.json")],
        "config.json: not a plain file",
    ),
    "header nested": (
        lambda path: (path / SECOND).write_bytes((9999).to_bytes(8, "little") + b"[" * 9999),
        f"{SECOND}: .*nested too deeply",
    ),
    "file a pipe": (
        lambda path: [(path / SECOND).unlink(), os.mkfifo(path / SECOND)],
        f"{SECOND}: .*not a plain file",
    ),
    "index leads nowhere": (
        lambda path: [
            (path / "model.safetensors.index.json").unlink(),
            (path / "model.safetensors.index.json").symlink_to("blob"),
        ],
        "index.json: No such file",
    ),
    "more layers than can be named": (
        lambda path: edit_config(path, num_hidden_layers=9999, n_routed_experts=9998),
        r"describes a model of 3\d\d,\d+,\d+ tensors \(9,999 layers, .*, and the folder holds \d+$",
    ),
    "no folder": (lambda path: path.rename(path.with_name("away")), "no such folder"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: No such file"),
    "no model": (
        lambda path: [file.unlink() for file in path.glob("*.safetensors*")],
        r"holds neither model\.safetensors\.index\.json nor model\.safetensors",
    ),
    "file missing": (lambda path: (path / SECOND).unlink(), f"names {SECOND}, which is missing"),
    "file cut off": (lambda path: cut(path, 5000 * 20), f"{SECOND}: .*truncated: 100000 bytes"),
    "header cut off": (lambda path: cut(path, 100), f"{SECOND}: .*truncated: 100 bytes"),
    "file empty": (lambda path: (path / SECOND).write_bytes(b""), f"{SECOND}: .*no safetensors"),
    "file longer": (lambda path: cut(path, 0), f"{SECOND}: longer than its header says"),
    "no header": (lambda path: (path / SECOND).write_bytes(b"\x03" + bytes(9)), "not readable as"),
    "not in the index": (
        lambda path: edit_index(path, lambda files: files.pop(NORM)),
        f"holds {re.escape(NORM)}, which the index places elsewhere",
    ),
    "in no file": (
        lambda path: edit_index(path, lambda files: files.update({"x.y": SECOND})),
        rf"places x\.y in {SECOND}, which does not hold it \(1 such in all\)",
    ),
    "elsewhere": (
        lambda path: edit_index(path, lambda files: files.update({"x.y": "../a.safetensors"})),
        r"names '\.\./a\.safetensors'; allowed: files of this folder",
    ),
    "nowhere": (
        lambda path: edit_index(path, lambda files: files.update({"x.y": ""})),
        "names ''; allowed: files of this folder",
    ),
    "the folder above": (
        lambda path: edit_index(path, lambda files: files.update({"x.y": ".."})),
        r"names '\.\.'; allowed: files of this folder",
    ),
    "index no JSON": (
        lambda path: (path / "model.safetensors.index.json").write_text("{"),
        "index.json: not JSON",
    ),
    "index no map": (
        lambda path: (path / "model.safetensors.index.json").write_text("{}"),
        "no weight_map",
    ),
    "not of Hugging Face": (
        lambda path: (path / "config.json").write_text("{}"),
        "has no model_type",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_told_in_one_line(tmp_path: Path, fault: str):
    spoil, message = BROKEN[fault]
    path = write_folder(tmp_path / "in", RAGGED, random_tensors(RAGGED, fp8=True), files=3)
    spoil(path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
