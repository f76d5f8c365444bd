"""Packing conserves every token, rows are random access, a tokenizer that loses text is refused."""

import collections
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from dsv3_jax.data import packing
from dsv3_jax.data.packing import Row, Rows, TokenizedCorpus, cached_tokenize, tokenize
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer

DOCUMENTS = [
    Document("code", "def f(x):\r\n\treturn x + 1\n"),
    Document("han", "你好，世界 👩‍👩‍👧‍👦"),
    Document("one", "x"),
    Document("control", "\x00\x1b<｜end▁of▁sentence｜>"),
    Document("long", "some words and 12345 numbers\n" * 20),
    Document("one again", "x"),
]
EOS = 1


def corpus_of(*lengths: int) -> TokenizedCorpus:
    """Documents of these numbers of tokens, which all differ but for the eos that ends each."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32) + 10
    tokens[offsets[1:] - 1] = EOS
    return TokenizedCorpus(tokens, offsets)


def stream_of(rows: Rows, epoch: int) -> np.ndarray:
    """Definition of an epoch: eos, then its documents one after the other."""
    order, _ = rows._epoch(epoch)
    offsets = rows.corpus.offsets
    documents = [rows.corpus.tokens[offsets[d] : offsets[d + 1]] for d in order]
    return np.concatenate([np.array([EOS], np.int32), *documents])


def cut(stream: np.ndarray, length: int) -> list[Row]:
    """Definition of the rows of a stream, in its order."""
    rows = []
    for start in range(0, len(stream) - 1, length):
        tokens, labels = stream[start : start + length], stream[start + 1 : start + length + 1]
        missing = length - len(labels)
        tokens = np.pad(tokens[: len(labels)], (0, missing), constant_values=EOS)
        rows.append(Row(tokens, np.pad(labels, (0, missing), constant_values=-1)))
    return rows


def multiset(rows: list[Row]) -> collections.Counter[tuple[bytes, bytes]]:
    return collections.Counter((row.tokens_T.tobytes(), row.labels_T.tobytes()) for row in rows)


def read_epoch(rows: Rows, epoch: int) -> list[Row]:
    return [rows[epoch * len(rows) + i] for i in range(len(rows))]


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
    monkeypatch.setattr(packing, "_CHUNK", 4)
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


# --- tokens to rows ---


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    length=st.integers(1, 30),
    seed=st.none() | st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
def test_rows_of_an_epoch_are_its_stream_cut_up(
    lengths: list[int], length: int, seed: int | None, epoch: int
) -> None:
    rows = Rows(corpus_of(*lengths), length, seed)
    found = read_epoch(rows, epoch)
    expected = cut(stream_of(rows, epoch), length)
    assert multiset(found) == multiset(expected)
    counted = np.concatenate([row.labels_T[row.labels_T >= 0] for row in found])
    assert sorted(counted) == sorted(rows.corpus.tokens)
    assert len(found) == -(-sum(lengths) // length)
    for row in found:
        assert row.tokens_T.shape == row.labels_T.shape == (length,)
        assert row.tokens_T.dtype == row.labels_T.dtype == np.int32


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_an_epoch_decodes_to_exactly_the_documents(tokenizer: Tokenizer, seed: int | None) -> None:
    corpus = tokenize(DOCUMENTS, tokenizer, 320)
    rows = Rows(corpus, 16, seed)
    for epoch in range(2):
        by_first_label = {row.labels_T.tobytes(): row for row in read_epoch(rows, epoch)}
        in_order = cut(stream_of(rows, epoch), 16)
        labels = [by_first_label[row.labels_T.tobytes()].labels_T for row in in_order]
        stream = np.concatenate(labels)
        stream = stream[stream >= 0]
        texts = np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)[:-1]
        assert sorted(map(tokenizer.decode, texts)) == sorted(d.text for d in DOCUMENTS)


def test_labels_are_the_tokens_shifted_by_one() -> None:
    for row in Rows(corpus_of(5, 9, 1, 30), 8, seed=3):
        counted = row.labels_T[:-1] >= 0
        np.testing.assert_array_equal(row.tokens_T[1:][counted], row.labels_T[:-1][counted])


def test_validation_keeps_the_order_of_the_documents() -> None:
    corpus = corpus_of(5, 9, 1, 30)
    rows = Rows(corpus, 8)
    for epoch in range(3):
        labels = np.concatenate([row.labels_T for row in read_epoch(rows, epoch)])
        np.testing.assert_array_equal(labels[: len(corpus.tokens)], corpus.tokens)
        assert (labels[len(corpus.tokens) :] == -1).all()
    assert rows[0].tokens_T[0] == EOS


def test_a_row_does_not_depend_on_what_was_read_before() -> None:
    corpus = corpus_of(*range(1, 30))
    one, other = Rows(corpus, 8, seed=5), Rows(corpus, 8, seed=5)
    indices = range(3 * len(one))
    forwards = {i: one[i] for i in indices}
    for i in reversed(indices):
        np.testing.assert_array_equal(other[i], forwards[i])


def test_seeds_and_epochs_give_different_orders() -> None:
    corpus = corpus_of(*range(1, 30))
    orders = set()
    for seed in (0, 1, 2**40):
        rows = Rows(corpus, 8, seed)
        for epoch in range(2):
            orders.add(tuple(rows._epoch(epoch)[0]))
            orders.add(tuple(rows._shuffled(epoch, i) for i in range(len(rows))))
    assert len(orders) == 2 * 3 * 2


def test_order_is_the_same_on_every_machine_and_version() -> None:
    rows = Rows(corpus_of(*[4] * 10), 4, seed=0)
    assert rows._epoch(1)[0].tolist() == [6, 4, 0, 2, 8, 3, 5, 7, 1, 9]
    assert [rows._shuffled(1, i) for i in range(10)] == [2, 8, 4, 1, 3, 9, 5, 0, 6, 7]


def test_a_row_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row length is 0 tokens; allowed: at least 1"):
        Rows(corpus_of(3), 0)


# --- cache ---


def forbid_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> TokenizedCorpus:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(packing, "tokenize", fail)


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
