"""Packing conserves every token, rows are random access, isolated documents never meet."""

import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import packing
from dsv3_jax.data.fim import ADDED, Fim
from dsv3_jax.data.packing import Row, Rows
from dsv3_jax.data.tokenised import TokenizedCorpus, tokenize
from dsv3_jax.data.tokenizer import Tokenizer
from tests.data.corpora import DOCUMENTS, EOS, corpus_of

# Row -> start of the SHA-256 of its tokens and labels
GOLDEN = {
    0: "1609407d8fe99f25",
    1: "bde55e194898cc79",
    2: "f91033d049f7ec82",
    1124: "4680ff19b4f6cdf9",
    1125: "7f97ebac2e937d92",
    10**6: "407b5c69a76b01db",
}


def stream_of(rows: Rows, epoch: int) -> np.ndarray:
    """Definition of an epoch: eos, then its documents one after the other."""
    order = rows._stream(epoch).order
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
        np.testing.assert_array_equal(other[i].tokens_T, forwards[i].tokens_T)
        np.testing.assert_array_equal(other[i].labels_T, forwards[i].labels_T)


def test_seeds_and_epochs_give_different_orders() -> None:
    corpus = corpus_of(*range(1, 30))
    orders = set()
    for seed in (0, 1, 2**40):
        rows = Rows(corpus, 8, seed)
        for epoch in range(2):
            orders.add(tuple(rows._stream(epoch).order))
            starts = [rows._place(epoch * len(rows) + i)[1] for i in range(len(rows))]
            orders.add(tuple(starts))
    assert len(orders) == 2 * 3 * 2


def test_rows_are_the_same_on_every_machine_and_version() -> None:
    """The hashes were taken before fill-in-the-middle, isolation and mixtures came in."""
    rows = Rows(corpus_of(*range(10, 135)), 8, seed=1)
    for index, expected in GOLDEN.items():
        row = rows[index]
        found = hashlib.sha256(row.tokens_T.tobytes() + row.labels_T.tobytes()).hexdigest()
        assert found[:16] == expected


def test_a_row_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row length is 0 tokens; allowed: at least 1"):
        Rows(corpus_of(3), 0)


# --- fill-in-the-middle ---

FIM = Fim(0.5, begin_id=2, hole_id=3, end_id=4, opening=0)


def restored(document: list[int]) -> list[int]:
    """A document in its own order, whatever order it was read in."""
    if document[0] != FIM.begin_id:
        return document
    hole, end = document.index(FIM.hole_id), document.index(FIM.end_id)
    return document[1:hole] + document[end + 1 : -1] + document[hole + 1 : end] + document[-1:]


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    length=st.integers(1, 30),
    seed=st.integers(0, 2**63),
)
def test_no_row_and_no_token_is_lost_or_repeated_with_the_middle_last(
    lengths: list[int], length: int, seed: int
) -> None:
    corpus = corpus_of(*lengths)
    rows = Rows(corpus, length, seed, FIM)
    first = 0
    for epoch in range(3):
        count = rows.rows_of_epoch(epoch)
        cuts = FIM.cuts(corpus.lengths, seed, epoch)
        assert count == -(-(sum(lengths) + ADDED * int((cuts[:, 0] >= 0).sum())) // length)
        starts = {rows._place(first + i)[1]: rows[first + i] for i in range(count)}
        assert len(starts) == count
        labels = np.concatenate([starts[start].labels_T for start in sorted(starts)])
        stream = labels[labels >= 0]
        documents = np.split(stream, np.flatnonzero(stream == EOS) + 1)[:-1]
        found = sorted(restored(document.tolist()) for document in documents)
        assert found == sorted(corpus.read(d).tolist() for d in range(len(lengths)))
        assert sum(document[0] == FIM.begin_id for document in documents) == (cuts[:, 0] >= 0).sum()
        first += count


def test_epochs_of_several_sizes_are_random_access() -> None:
    corpus = corpus_of(*range(2, 40))
    forwards, far = Rows(corpus, 8, 5, FIM), Rows(corpus, 8, 5, FIM)
    index = 5 * len(forwards)
    rows = [forwards[i] for i in range(index + 1)]
    np.testing.assert_array_equal(far[index].tokens_T, rows[-1].tokens_T)
    assert len({forwards.rows_of_epoch(epoch) for epoch in range(5)}) > 1


def test_rate_zero_changes_nothing() -> None:
    corpus = corpus_of(*range(2, 40))
    plain, never = Rows(corpus, 8, 5), Rows(corpus, 8, 5, Fim(0.0, 2, 3, 4, 0))
    for index in range(3 * len(plain)):
        np.testing.assert_array_equal(plain[index].labels_T, never[index].labels_T)


# --- long documents ---


@pytest.mark.parametrize(("seed", "fim"), [(None, None), (5, None), (5, FIM)])
def test_a_long_document_is_read_once_for_all_its_rows(
    seed: int | None, fim: Fim | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, rearranged = collections.Counter(), collections.Counter()
    original_read, original_rearrange = TokenizedCorpus.read, Fim.rearrange

    def counted_read(corpus: TokenizedCorpus, document: int) -> np.ndarray:
        read[document] += 1
        return original_read(corpus, document)

    def counted_rearrange(fim: Fim, ids: np.ndarray, *cuts: int) -> np.ndarray:
        rearranged[len(ids)] += 1
        return original_rearrange(fim, ids, *cuts)

    lengths = (9, 4000, 30, 7, 5000, 12)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_LONG_ROWS", 10**9)
        expected = [*Rows(corpus_of(*lengths), 8, seed, fim)]
    monkeypatch.setattr(TokenizedCorpus, "read", counted_read)
    monkeypatch.setattr(Fim, "rearrange", counted_rearrange)
    rows = Rows(corpus_of(*lengths), 8, seed, fim)
    for row, wanted in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row.tokens_T, wanted.tokens_T)
        np.testing.assert_array_equal(row.labels_T, wanted.labels_T)
    assert len(expected) > 1000
    assert read[1] == read[4] == 1
    assert rearranged[4000] <= 1
    assert rearranged[5000] <= 1


def test_a_long_document_is_rearranged_anew_in_each_epoch() -> None:
    always = Fim(1.0, begin_id=2, hole_id=3, end_id=4, opening=0)
    corpus = corpus_of(1000, 1000)
    one = Rows(corpus, 8, 5, always)
    for epoch in range(3):
        stream = one._stream(epoch)
        for document in range(2):
            wanted = always.rearrange(corpus.read(document), *stream.cuts[document].tolist())
            np.testing.assert_array_equal(one._document(stream, document), wanted)


# --- isolation ---


def slow_segments(stream: np.ndarray, start: int, length: int) -> tuple[list[int], list[int]]:
    """(segments, labels) of a row token by token: a segment ends with an eos, and so does what may
    be predicted; what fills the row up is one segment more.
    """
    segments, labels, segment = [], [], 0
    for t in range(start, start + length):
        segments.append(segment)
        ends = t >= len(stream) - 1 or stream[t] == EOS
        labels.append(-1 if ends else int(stream[t + 1]))
        segment += t < len(stream) and stream[t] == EOS
    return segments, labels


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    length=st.integers(1, 30),
    seed=st.none() | st.integers(0, 2**63),
)
def test_isolated_documents_are_numbered_and_never_predict_each_other(
    lengths: list[int], length: int, seed: int | None
) -> None:
    corpus = corpus_of(*lengths)
    plain, isolated = Rows(corpus, length, seed), Rows(corpus, length, seed, isolate=True)
    for epoch in range(2):
        stream = stream_of(plain, epoch)
        for index in range(epoch * len(plain), (epoch + 1) * len(plain)):
            row, (_, start) = isolated[index], plain._place(index)
            np.testing.assert_array_equal(row.tokens_T, plain[index].tokens_T)
            assert row.segments_T.dtype == np.int32
            segments, labels = slow_segments(stream, start, length)
            assert row.segments_T.tolist() == segments
            assert row.labels_T.tolist() == labels


def test_isolated_documents_may_be_rearranged() -> None:
    corpus = corpus_of(*range(2, 40))
    plain, isolated = Rows(corpus, 8, 5, FIM), Rows(corpus, 8, 5, FIM, isolate=True)
    for index in range(len(plain)):
        row, expected = isolated[index], plain[index]
        np.testing.assert_array_equal(row.tokens_T, expected.tokens_T)
        ends = (row.tokens_T == EOS) | (expected.labels_T < 0)
        np.testing.assert_array_equal(row.labels_T, np.where(ends, -1, expected.labels_T))


def test_rows_that_are_not_isolated_have_no_segments() -> None:
    assert Rows(corpus_of(3, 4), 2, 0)[0].segments_T is None


# --- names ---


@pytest.mark.parametrize("fim", [None, FIM])
def test_names_are_those_of_the_documents_that_a_row_predicts(fim: Fim | None) -> None:
    offsets = np.cumsum([0, 5, 9, 1, 30], dtype=np.int64)
    # Even what ends a document is a token of its own here.
    corpus = TokenizedCorpus(np.arange(45, dtype=np.int32) + 10, offsets, ("a", "b", "c", "d"))
    owner = {t: name for d, name in enumerate(corpus.names) for t in corpus.read(d).tolist()}
    for length in (1, 5, 8):
        rows = Rows(corpus, length, 3, fim)
        for index in range(2 * len(rows)):
            own = [owner[t] for t in rows[index].labels_T.tolist() if t in owner]
            names = rows.names_of(index)
            added = set(names) - set(own)  # a row may hold nothing else of them than FIM's ids
            assert [name for name in names if name not in added] == list(dict.fromkeys(own))
            assert fim is not None or not added
    assert Rows(corpus_of(5, 9), 8).names_of(1) == ["document 1"]
