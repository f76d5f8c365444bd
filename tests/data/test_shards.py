"""Folders of tokens give back every document; unfinished, damaged and foreign ones are refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from dsv3_jax.data.documents import Document, text_hash
from dsv3_jax.data.loader import load
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.shards import (
    FORMAT,
    MANIFEST,
    ShardWriter,
    TokenFolder,
    is_token_folder,
)
from dsv3_jax.data.tokenised import encode_documents
from dsv3_jax.data.tokenizer import Tokenizer
from tests.data.corpora import DOCUMENTS

MADE = {"bytes": 7, "content_hash": "abc", "validation_fraction": 0.1, "split_rate": 0.0}
HELD_OUT = [False, True, False, False, True, False]


def write(folder: Path, tokenizer: Tokenizer, shard_bytes: int = 100) -> list[np.ndarray]:
    """Writes `DOCUMENTS`, about one in a shard; their ids."""
    writer = ShardWriter(folder, tokenizer, shard_bytes)
    divided = zip(DOCUMENTS, HELD_OUT, strict=True)
    written = []
    for document, held_out, ids in encode_documents(divided, tokenizer):
        writer.add(document, held_out, ids)
        written.append(ids)
    assert not (folder / MANIFEST).exists()
    writer.finish(**MADE)
    return written


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"^data\.source: ") as error:
        TokenFolder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**6])
def test_every_document_is_read_back_alone(
    tmp_path: Path, tokenizer: Tokenizer, shard_bytes: int
) -> None:
    written = write(tmp_path, tokenizer, shard_bytes)
    folder = TokenFolder(tmp_path)
    for place in reversed(range(len(DOCUMENTS))):
        found = folder.read(place)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, written[place])
        assert folder.name_of(place) == DOCUMENTS[place].name
    assert folder.lengths.tolist() == [len(ids) for ids in written]
    assert folder.held_out.tolist() == HELD_OUT
    assert folder._index["text_hash"].tolist() == [text_hash(d.text) for d in DOCUMENTS]
    assert folder.tokenizer.content_hash == tokenizer.content_hash
    assert folder.eos_id == tokenizer.eos_id


def test_the_manifest_says_what_is_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    written = write(tmp_path, tokenizer)
    manifest = TokenFolder(tmp_path).manifest
    assert (manifest.format, manifest.dtype) == (FORMAT, "<u2")
    assert manifest.vocab_size == tokenizer.vocab_size
    assert manifest.documents == sum(manifest.shards.values()) == len(DOCUMENTS)
    assert len(manifest.shards) > 1
    assert manifest.tokens == sum(map(len, written))
    assert {name: getattr(manifest, name) for name in MADE} == MADE
    assert set(manifest.files) == {p.name for p in tmp_path.iterdir()} - {MANIFEST}
    for name, file in manifest.files.items():
        assert (tmp_path / name).stat().st_size == file.bytes


def test_ids_beyond_two_bytes_are_kept(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0, "x": 1, "y": 2**16}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="x")), "big")
    writer = ShardWriter(tmp_path, tokenizer)
    writer.add(Document("a", "y"), False, np.array([2**16, 0], np.int32))
    assert writer.finish(**MADE).dtype == "<u4"
    assert TokenFolder(tmp_path).read(0).tolist() == [2**16, 0]


def test_names_that_are_no_text_survive(tmp_path: Path, tokenizer: Tokenizer) -> None:
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    writer = ShardWriter(tmp_path, tokenizer)
    writer.add(Document(name, "x"), False, np.array([0, 7, 1], np.int32))
    writer.finish(**MADE)
    assert TokenFolder(tmp_path).name_of(0) == name


def test_a_folder_without_manifest_is_unfinished(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert not is_token_folder(tmp_path)
    write(tmp_path, tokenizer)
    (tmp_path / MANIFEST).unlink()
    assert is_token_folder(tmp_path)
    assert f"{tmp_path} has no {MANIFEST}: python -m dsv3_jax.pretokenize did not" in refusal(
        tmp_path
    )


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (b"{", "is damaged; write the folder again"),
        (b"[]", "is damaged; write the folder again"),
        (b"[" * 10**5, "is damaged; write the folder again"),
        (b"\xff", "is damaged; write the folder again"),
        (b"{}", "has format None; allowed"),
        (b'{"format": "another"}', f"has format 'another'; allowed: {FORMAT!r}"),
        (json.dumps({"format": FORMAT, "files": {}}).encode(), "is damaged"),
    ],
)
def test_another_manifest_is_refused(tmp_path: Path, manifest: bytes, expected: str) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest)
    assert f"{tmp_path / MANIFEST} {expected}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "<f4"),
        ("dtype", 2),
        ("documents", "many"),
        ("documents", 0),
        ("tokens", 1.5),
        ("vocab_size", None),
        ("split_rate", "0"),
        ("content_hash", 7),
        ("shards", ["shard-00000.array_record"]),
        ("shards", {"shard-00000.array_record": -1}),
        ("files", {"tokenizer.json": {"bytes": "9", "sha256": "0"}}),
        ("files", 3),
    ],
)
def test_a_manifest_whose_numbers_are_none_is_damaged(
    tmp_path: Path, tokenizer: Tokenizer, field: str, value: object
) -> None:
    write(tmp_path, tokenizer)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes()) | {field: value}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert f"{tmp_path / MANIFEST} is damaged; write the folder again" in refusal(tmp_path)


def test_an_index_of_other_documents_is_damaged(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Even if the manifest has its checksum."""
    write(tmp_path, tokenizer)
    np.save(tmp_path / "index.npy", np.zeros(3))
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    data = (tmp_path / "index.npy").read_bytes()
    sums = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["index.npy"] = sums
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert f"{tmp_path / MANIFEST} is damaged; write the folder again" in refusal(tmp_path)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokenizer.json", "index.npy"])
def test_changed_index_and_tokenizer_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    write(tmp_path, tokenizer)
    flip(tmp_path / name, -1)
    assert f"{tmp_path / name} is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_shards_that_are_cut_or_gone_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, damage: str
) -> None:
    write(tmp_path, tokenizer)
    shard = tmp_path / "shard-00001.array_record"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    assert f"{shard} is not as {MANIFEST} says" in refusal(tmp_path)


def test_a_damaged_record_is_refused_where_it_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    written = write(tmp_path, tokenizer, shard_bytes=10**6)
    shard = tmp_path / "shard-00000.array_record"
    place = shard.read_bytes().index(written[4].astype("<u2").tobytes())
    flip(shard, place + 5)
    folder = TokenFolder(tmp_path)
    with pytest.raises(OSError, match="document 4 of the folder cannot be read") as error:
        folder.read(4)
    assert f"{shard} is damaged" in str(error.value)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(folder.read(0), written[0])
    with pytest.raises(OSError, match="is damaged") as error:
        list(load(Rows(folder, 8, seed=0), 0, [sum(map(len, written))], readers=2))
    assert "\n" not in str(error.value)


def test_records_that_are_not_those_of_the_index_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(tmp_path, tokenizer, shard_bytes=1)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    manifest["shards"] = dict(reversed(manifest["shards"].items()))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(OSError, match=r"document 0 of the folder cannot be read \(a record of"):
        TokenFolder(tmp_path).read(0)
