"""No byte is ever lost, the rules are DeepSeek's, and a file that is no tokenizer is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dsv3_jax.data import tokenizer as module
from dsv3_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    cached_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

EVERY_KIND = (
    "",
    " ",
    "\x00\x01\x7f\x1b[0m\ufeff",
    "a\r\nb\rc\n\n\t d  \u00a0\u3000 ",
    "你好，世界。こんにちは、カタカナ 12345 ½ ٣",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \U0010ffff",
    "<｜begin▁of▁sentence｜>x<｜end▁of▁sentence｜> <｜fim▁hole｜>",
    "".join(map(chr, range(0x180))),
)


def encoded_bytes(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text))


def word_level(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


# --- bytes ---


@pytest.mark.parametrize("text", EVERY_KIND)
def test_every_text_returns_byte_for_byte(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert encoded_bytes(tokenizer, text) == text.encode()


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_any_text_returns_byte_for_byte(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert encoded_bytes(tokenizer, text) == text.encode()


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(EVERY_KIND)
    for text, ids in zip(EVERY_KIND, batch, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bytes_of_each_token_are_what_the_library_decodes(tokenizer: Tokenizer) -> None:
    assert sorted(set(tokenizer.token_bytes[6:262])) == [bytes([b]) for b in range(256)]
    for token_id in range(6, tokenizer.vocab_size):
        decoded = tokenizer._backend.decode([token_id])
        assert tokenizer.token_bytes[token_id].decode(errors="replace") == decoded
    lengths = tokenizer.byte_lengths_V
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(data) for data in tokenizer.token_bytes]
    assert not lengths[: len(SPECIAL_TOKENS)].any()
    assert lengths[len(SPECIAL_TOKENS) :].all()


def test_alphabet_is_the_librarys() -> None:
    assert set(module._byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in EVERY_KIND[1:]:
        ((spelling, _),) = split.pre_tokenize_str(text)
        assert bytes(module._byte_alphabet()[char] for char in spelling) == text.encode()


def test_broken_and_unknown_ids_decode_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    half = tokenizer.token_bytes.index(b"\xe4")
    beyond = tokenizer.vocab_size
    ids = [*tokenizer.encode("a"), half, *tokenizer.encode("b"), beyond, -1, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd\ufffd"


# --- training ---


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567 v12", ["123", "456", "7", " v", "12"]),
        ("abc你好かなカナdef", ["abc", "你好かなカナ", "def"]),
        ("_name.attr", ["_name", ".attr"]),
        ("a b\tc", ["a", " b", "\tc"]),
        ("naïve e\u0301te", ["naïve", " e\u0301te"]),
        ("f(x):\n\n  y", ["f", "(x", "):\n\n", " ", " y"]),
        ("a != b", ["a", " !=", " b"]),
        ("a  \n\n b", ["a", "  \n\n", " b"]),
        ("if x:\r\n    y", ["if", " x", ":\r\n", "   ", " y"]),
        ("end   ", ["end", "   "]),
        ("x = 1", ["x", " =", " ", "1"]),
        ("a\x00b", ["a", "\x00b"]),
    ],
)
def test_text_is_split_by_the_reports_rules(text: str, pieces: list[str]) -> None:
    found = module._pre_tokenizer().pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in found] == pieces


def test_no_token_crosses_a_split() -> None:
    tokenizer = train_tokenizer(["ab12345 你好x = "] * 50, vocab_size=400)
    tokens = {data.decode(errors="replace") for data in tokenizer.token_bytes}
    assert {"ab", "123", "45", "你好", " ="} <= tokens
    assert not {"1234", "345", "b1", "好x", "x ="} & tokens


def test_special_tokens_are_the_lowest_ids(tokenizer: Tokenizer) -> None:
    ids = [tokenizer._backend.token_to_id(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(6))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_a_text_never_yields_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("".join(SPECIAL_TOKENS)).min() >= len(SPECIAL_TOKENS)


def test_training_is_the_same_with_any_number_of_threads() -> None:
    text = Path(module.__file__).read_text()
    code = (
        "import sys; from dsv3_jax.data.tokenizer import train_tokenizer as train;"
        "print(train([open(sys.argv[1]).read()] * 5, 600).content_hash)"
    )
    serial = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, module.__file__]
    root = Path(module.__file__).parents[2]
    result = subprocess.run(
        command, cwd=root, env=os.environ | serial, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == train_tokenizer([text] * 5, 600).content_hash


def test_vocabulary_is_filled_but_a_small_corpus_need_not() -> None:
    texts = [Path(module.__file__).read_text()]
    assert train_tokenizer(texts, 500).vocab_size == 500
    assert 262 <= train_tokenizer(["ab ab"], 500).vocab_size < 270


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    assert train_tokenizer(["aaaa"], 262).vocab_size == 262
    with pytest.raises(ValueError, match=r"is 261; allowed.*: 262 \(256 bytes and 6"):
        train_tokenizer(["aaaa"], 261)


# --- files ---


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded.name == str(path)
    assert loaded.content_hash == tokenizer.content_hash
    assert loaded.token_bytes == tokenizer.token_bytes
    for text in EVERY_KIND:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert plain.decode(plain.encode(EVERY_KIND[4]).ids) == EVERY_KIND[4]


def test_settings_that_change_texts_are_switched_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=5000)
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    text = module.__doc__
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize(
    ("vocabulary", "bos_id", "eos_id"),
    [
        ({"<unk>": 0, "<s>": 1, "</s>": 2}, 1, 2),
        ({"<unk>": 0, "<|endoftext|>": 5}, 5, 5),
        ({"<unk>": 0, "<|begin_of_text|>": 7, "<|end_of_text|>": 8}, 7, 8),
        ({"<unk>": 0, "[BOS]": 1, "[EOS]": 2}, 1, 2),
    ],
)
def test_separators_are_found_by_name(
    tmp_path: Path, vocabulary: dict[str, int], bos_id: int, eos_id: int
) -> None:
    path = tmp_path / "tokenizer.json"
    word_level(vocabulary).save(str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)
    assert tokenizer.vocab_size == max(vocabulary.values()) + 1
    assert tokenizer.token_bytes[bos_id] == tokenizer.token_bytes[eos_id] == b""


def test_sentencepiece_with_byte_fallback_keeps_every_byte(tmp_path: Path) -> None:
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for text in EVERY_KIND[:6]:
        assert encoded_bytes(tokenizer, text) == text.encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read it: No such file"),
        (b"", "no tokenizer.json: EOF"),
        (b"{", "no tokenizer.json: EOF"),
        (b"\xff", "no tokenizer.json: not UTF-8 at byte 0"),
        (b'{"model": 3}', "no tokenizer.json: "),
        (json.dumps([1]).encode(), "no tokenizer.json: "),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read it: not a plain file"):
        load_tokenizer(tmp_path)


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # to read it would be to wait for who writes to it
    with pytest.raises(ValueError, match="cannot read it: not a plain file"):
        load_tokenizer(tmp_path / "pipe.json")


def test_a_vocabulary_without_end_of_sentence_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    word_level({"<unk>": 0, "a": 1}).save(str(path))
    with pytest.raises(ValueError, match="no end-of-sentence token; looked for") as error:
        load_tokenizer(path)
    for name in (str(path), SPECIAL_TOKENS[1], "</s>", "<|endoftext|>"):
        assert name in str(error.value)


def test_an_id_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    described = json.loads(word_level({"<unk>": 0, "</s>": 1}).to_str())
    described["model"]["vocab"]["far"] = 4 * 10**9
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="has id 4000000000 for 'far'; allowed: at most 16777215"):
        load_tokenizer(path)


def test_settings_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    word_level({"<unk>": 0, "</s>": 1}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[" * 10**5)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 1


# --- cache ---

TEXTS = ["some text, some more text\n"] * 4


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(texts: list[str], vocab_size: int) -> Tokenizer:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "train_tokenizer", train)


def test_a_tokenizer_is_trained_once(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_tokenizer(TEXTS, 280)
    (file,) = (cache_home / "dsv3_jax" / "tokenizers").iterdir()
    assert file.suffix == ".json"
    forbid_training(monkeypatch)
    assert cached_tokenizer(TEXTS, 280).content_hash == first.content_hash
    for texts, vocab_size in ((TEXTS, 281), (TEXTS[1:], 280)):
        with pytest.raises(AssertionError, match="trained again"):
            cached_tokenizer(texts, vocab_size)


@pytest.mark.parametrize("damage", [b"", b"half a fi", b"\x00\xff"])
def test_a_damaged_cache_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    first = cached_tokenizer(TEXTS, 280, tmp_path)
    (file,) = (tmp_path / "tokenizers").iterdir()
    file.write_bytes(damage)
    assert cached_tokenizer(TEXTS, 280, tmp_path).content_hash == first.content_hash
    forbid_training(monkeypatch)
    assert cached_tokenizer(TEXTS, 280, tmp_path).content_hash == first.content_hash


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tokenizer = cached_tokenizer(TEXTS, 280, tmp_path / "file")
    assert tokenizer.content_hash == train_tokenizer(TEXTS, 280).content_hash


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda override: None)
    tokenizer = cached_tokenizer(TEXTS, 280)
    assert tokenizer.content_hash == train_tokenizer(TEXTS, 280).content_hash


@pytest.mark.parametrize("stated", ["<end>", {"content": "<end>"}])
def test_settings_beside_a_tokenizer_say_what_ends_a_text(tmp_path: Path, stated: object) -> None:
    word_level({"<unk>": 0, "<begin>": 1, "<end>": 2, "x": 3}).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ValueError, match=r"and for eos_token in tokenizer_config\.json beside it"):
        load_tokenizer(tmp_path / "tokenizer.json")
    beside = {"bos_token": "<begin>", "eos_token": stated}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
