"""Documents become ids between bos and eos, once; a tokenizer that loses text is refused."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from dsv3_jax.data import tokenised
from dsv3_jax.data.documents import Document
from dsv3_jax.data.tokenised import (
    Joined,
    Selected,
    TokenizedCorpus,
    cached_tokenize,
    encode_documents,
    joined,
    tokenize,
)
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.corpora import DOCUMENTS, corpus_of

# --- documents to tokens ---


def test_documents_stand_between_bos_and_eos(tokenizer: Tokenizer) -> None:
    corpus = tokenize(DOCUMENTS, tokenizer, tokenizer.vocab_size)
    assert corpus.tokens.dtype == np.int32
    assert corpus.eos_id == tokenizer.eos_id
    assert len(corpus.offsets) == len(DOCUMENTS) + 1
    for i, document in enumerate(DOCUMENTS):
        bos, *ids, eos = corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]]
        assert (bos, eos) == (tokenizer.bos_id, tokenizer.eos_id)
        assert ids == tokenizer.encode(document.text).tolist()


def test_more_documents_than_one_chunk_stay_in_order(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize(DOCUMENTS, tokenizer, 320)
    monkeypatch.setattr(tokenised, "_CHUNK", 4)
    in_chunks = tokenize(DOCUMENTS, tokenizer, 320)
    np.testing.assert_array_equal(in_chunks.tokens, whole.tokens)
    np.testing.assert_array_equal(in_chunks.offsets, whole.offsets)


def test_one_separator_serves_where_bos_is_eos(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "x": 1}, unk_token="x"))
    backend.save(str(tmp_path / "tokenizer.json"))
    corpus = tokenize([Document("a", "x")] * 2, load_tokenizer(tmp_path / "tokenizer.json"), 2)
    assert corpus.tokens.tolist() == [1, 0, 1, 0]


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    for function in (tokenize, cached_tokenize):
        with pytest.raises(ValueError, match=r"has 320 ids; model.vocab_size is 319; allowed"):
            function(DOCUMENTS, tokenizer, 319)


def test_no_documents_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="0 documents"):
        tokenize([], tokenizer, 320)


def byte_level(symbols: str) -> tokenizers.Tokenizer:
    vocabulary = {symbol: i for i, symbol in enumerate(["</s>", *symbols])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


def lower_case() -> tokenizers.Tokenizer:
    backend = byte_level("".join(sorted(pre_tokenizers.ByteLevel.alphabet())))
    backend.normalizer = normalizers.Lowercase()
    return backend


def unknown_words() -> tokenizers.Tokenizer:
    vocabulary = {"<unk>": 0, "</s>": 1, "good": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return backend


@pytest.mark.parametrize(
    ("backend", "text", "lost"),
    [
        (byte_level("god"), "go odd", r"at byte 2 the text has b' odd', its tokens b'odd'"),
        (byte_level("god"), "good é", r"at byte 4 the text has b' \\xc3\\xa9', its tokens b''"),
        (lower_case(), "good Good", r"at byte 5 the text has b'Good', its tokens b'good'"),
        (unknown_words(), "good dog", r"at byte 4 the text has b' dog', its tokens b'<unk>"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(
    tmp_path: Path, backend: tokenizers.Tokenizer, text: str, lost: str
) -> None:
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    documents = [Document("fine", "good"), Document("bad", text)]
    with pytest.raises(ValueError, match=lost) as error:
        tokenize(documents, load_tokenizer(path), 1000)
    assert f"tokenizer {path} does not keep document bad" in str(error.value)
    assert "\n" not in str(error.value)


# --- cache ---


def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> TokenizedCorpus:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokenised, "tokenize", fail)


def test_documents_are_tokenized_once(
    tokenizer: Tokenizer, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_tokenize(DOCUMENTS, tokenizer, 320)
    assert len(list((cache_home / "dsv3_jax" / "tokens").iterdir())) == 1
    forbid_tokenizing(monkeypatch)
    again = cached_tokenize(DOCUMENTS, tokenizer, 320)
    np.testing.assert_array_equal(again.tokens, first.tokens)
    np.testing.assert_array_equal(again.offsets, first.offsets)
    with pytest.raises(AssertionError, match="tokenized again"):
        cached_tokenize(DOCUMENTS[1:], tokenizer, 320)


def test_another_tokenizer_has_another_entry(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path)
    path = tmp_path / "tokenizer.json"
    lower_case().save(str(path))
    forbid_tokenizing(monkeypatch)
    with pytest.raises(AssertionError, match="tokenized again"):
        cached_tokenize(DOCUMENTS, load_tokenizer(path), 320, tmp_path)


@pytest.mark.parametrize("damage", ["empty", "half", "one byte"])
def test_a_damaged_cache_file_is_replaced(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path)
    (file,) = (tmp_path / "tokens").iterdir()
    data = bytearray(file.read_bytes())
    data[300] ^= 1
    file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "one byte": data}[damage])
    again = cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path)
    np.testing.assert_array_equal(again.tokens, first.tokens)
    forbid_tokenizing(monkeypatch)
    cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path)


def test_a_cache_that_cannot_be_written_stops_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    corpus = cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path / "file")
    np.testing.assert_array_equal(corpus.tokens, tokenize(DOCUMENTS, tokenizer, 320).tokens)


def test_split_tokens_have_an_entry_of_their_own(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path)
    split = cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path, split_rate=1.0)
    forbid_tokenizing(monkeypatch)
    again = cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path, split_rate=1.0)
    np.testing.assert_array_equal(again.tokens, split.tokens)
    for rate in (0.5, 0.25):
        with pytest.raises(AssertionError, match="tokenized again"):
            cached_tokenize(DOCUMENTS, tokenizer, 320, tmp_path, split_rate=rate)


def test_names_come_with_cached_tokens_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    renamed = [Document(f"copy of {document.name}", document.text) for document in DOCUMENTS]
    for documents in (DOCUMENTS, renamed):
        corpus = cached_tokenize(documents, tokenizer, 320, tmp_path)
        names = [corpus.name_of(i) for i in range(len(documents))]
        assert names == [document.name for document in documents]


# --- collections ---


def test_documents_are_encoded_as_they_are_asked_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenised, "_CHUNK_CHARACTERS", 20)
    read = []

    def documents():
        for number in range(100):
            read.append(number)
            yield Document(str(number), "0123456789"), False

    encoded = encode_documents(documents(), tokenizer)
    next(encoded)
    assert read == [0, 1]
    names = [document.name for document, _, _ in encoded]
    assert names == [str(number) for number in range(1, 100)]


def test_held_out_documents_are_never_split(tokenizer: Tokenizer) -> None:
    text = "def f(x):\n" * 50
    divided = [(Document("train", text), False), (Document("held out", text), True)]
    train, held_out = (ids for _, _, ids in encode_documents(divided, tokenizer, 1.0))
    assert held_out[1:-1].tolist() == tokenizer.encode(text).tolist()
    assert len(train) > len(held_out)


def test_selected_and_joined_documents_are_the_documents(tokenizer: Tokenizer) -> None:
    parts = [corpus_of(3, 1, 4), Selected(corpus_of(2, 7, 1, 8), np.array([3, 1])), corpus_of(5)]
    whole = joined(parts)
    assert joined(parts[:1]) is parts[0]
    assert isinstance(whole, Joined)
    expected = [(part, place) for part in parts for place in range(len(part.lengths))]
    assert whole.lengths.tolist() == [3, 1, 4, 8, 7, 5]
    for document, (part, place) in enumerate(expected):
        np.testing.assert_array_equal(whole.read(document), part.read(place))
        assert whole.name_of(document) == part.name_of(place)
        assert len(whole.read(document)) == whole.lengths[document]
    assert [whole.name_of(i) for i in (3, 4)] == ["document 3", "document 1"]
