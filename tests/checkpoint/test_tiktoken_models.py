"""A model whose tokenizer is a `tiktoken.model` is imported and exported with it."""

import json
from pathlib import Path

import dsv3_jax
from dsv3_jax.checkpoint.run_model import write_model
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.train.folder import RunFolder
from tests.checkpoint.hf_folders import random_tensors, write_folder
from tests.data import tiktoken_folder
from tests.shapes import tiny_model

CFG = tiny_model(num_layers=1, num_dense_layers=1, mtp_depth=0)


def test_import_and_export_keep_the_tokenizer(tmp_path: Path):
    source = write_folder(tmp_path / "kimi", CFG, random_tensors(CFG, fp8=False))
    wanted = load_tokenizer(tiktoken_folder.write_folder(source)).content_hash
    assert load_tokenizer(RunFolder(source).tokenizer).content_hash == wanted  # as --init-from

    model = dsv3_jax.load_pretrained(source, progress=False)
    imported = tmp_path / "imported"
    write_model(model, source, imported, overwrite=False)
    assert load_tokenizer(imported / "tokenizer.json").content_hash == wanted
    meta = json.loads(next(imported.rglob("meta.json")).read_text())
    assert meta["data"]["tokenizer"] == wanted

    exported = tmp_path / "exported"
    dsv3_jax.save_pretrained(model, exported, tokenizer_from=imported, progress=False)
    assert load_tokenizer(exported / "tiktoken.model").content_hash == wanted


def test_a_tokenizer_that_cannot_be_used_stops_no_import(tmp_path: Path):
    source = write_folder(tmp_path / "kimi", CFG, random_tensors(CFG, fp8=False))
    tiktoken_folder.write_folder(source)
    (source / "tokenization_kimi.py").write_text("")
    write_model(
        dsv3_jax.load_pretrained(source, progress=False), source, tmp_path / "out", overwrite=False
    )
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert (tmp_path / "out/tiktoken.model").exists()
