"""Batches are a function of consumed rows alone: any start, any sizes, any number of readers."""

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.documents import Document
from dsv3_jax.data.fim import fim_of
from dsv3_jax.data.loader import Batch, batch_at, load
from dsv3_jax.data.mixture import Mixture
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.shards import ShardWriter, TokenFolder
from dsv3_jax.data.tokenised import TokenDocuments, TokenizedCorpus, encode_documents, tokenize
from dsv3_jax.data.tokenizer import Tokenizer


@pytest.fixture
def rows() -> Rows:
    """1125 rows of 8 tokens an epoch."""
    lengths = np.arange(10, 135)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    return Rows(TokenizedCorpus(tokens, offsets), 8, seed=1)


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    np.testing.assert_array_equal(found.labels_BT, expected.labels_BT)
    assert (found.segments_BT is None) == (expected.segments_BT is None)
    if expected.segments_BT is not None:
        np.testing.assert_array_equal(found.segments_BT, expected.segments_BT)


def test_a_batch_is_its_rows_stacked(rows: Rows) -> None:
    batch = batch_at(rows, 3, 5)
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (5, 8)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == np.int32
    for i in range(5):
        np.testing.assert_array_equal(batch.tokens_BT[i], rows[3 + i].tokens_T)
        np.testing.assert_array_equal(batch.labels_BT[i], rows[3 + i].labels_T)


@pytest.mark.parametrize("sizes", [(4,) * 20, (4, 4, 8, 8, 12, 4)])
def test_a_part_of_each_batch_is_that_part(rows: Rows, sizes: tuple[int, ...]) -> None:
    """What a process makes whose devices have the first and the last quarter of a batch."""

    def own(size: int) -> list[int]:
        return [*range(size // 4), *range(3 * size // 4, size)]

    start = 1120
    for batch, size in zip(load(rows, start, sizes, own=own), sizes, strict=True):
        whole = batch_at(rows, start, size)
        assert_same(batch, Batch(*(x if x is None else x[own(size)] for x in whole)))
        start += size


@pytest.mark.parametrize("readers", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 1124, 1125, 5000])
@pytest.mark.parametrize("sizes", [(4,) * 20, (1, 2, 3, 38, 39, 5, 1), (90, 1)])
def test_loading_equals_random_access(
    rows: Rows, readers: int, start: int, sizes: tuple[int, ...]
) -> None:
    batches = list(load(rows, start, sizes, readers))
    assert len(batches) == len(sizes)
    for batch, size in zip(batches, sizes, strict=True):
        assert_same(batch, batch_at(rows, start, size))
        start += size


def test_a_resumed_run_sees_the_rows_it_would_have_seen(rows: Rows) -> None:
    sizes = [3, 3, 6, 6, 12, 12, 24]
    start = len(rows) - 30  # the next epoch begins inside the sixth batch
    through = list(load(rows, start, sizes))
    resumed = list(load(rows, start + sum(sizes[:4]), sizes[4:], readers=3))
    for found, expected in zip(resumed, through[4:], strict=True):
        assert_same(found, expected)


def test_sizes_are_taken_one_at_a_time(rows: Rows) -> None:
    taken = []

    def sizes() -> Iterator[int]:
        for size in itertools.count(1):
            taken.append(size)
            yield size

    batches = load(rows, 0, sizes())
    shapes = [len(batch.tokens_BT) for batch in itertools.islice(batches, 3)]
    assert shapes == taken == [1, 2, 3]
    batches.close()


def wait_for_threads(number: int) -> None:
    deadline = time.monotonic() + 10
    while threading.active_count() > number:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_readers_end_with_the_loader(rows: Rows) -> None:
    before = threading.active_count()
    batches = load(rows, 0, itertools.repeat(2), readers=3)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    wait_for_threads(before)


def test_readers_end_when_the_sizes_fail(rows: Rows) -> None:
    def sizes() -> Iterator[int]:
        yield 2
        raise RuntimeError("no more")

    before = threading.active_count()
    batches = load(rows, 0, sizes(), readers=3)
    next(batches)
    assert threading.active_count() > before
    with pytest.raises(RuntimeError, match="no more") as error:
        next(batches)
    wait_for_threads(before)
    assert error.tb is not None  # which keeps the loader's frame, so nothing ended by chance


def test_reading_ahead_is_bounded(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Rows.__getitem__

    def counting(self: Rows, index: int) -> object:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Rows, "__getitem__", counting)
    monkeypatch.setattr("dsv3_jax.data.loader._AHEAD_TOKENS", 10 * rows.length)
    batches = load(rows, 0, itertools.repeat(2))
    next(batches)
    time.sleep(0.1)
    batches.close()
    assert 2 < max(read) < 2 + 10 + 1


# --- every kind of rows ---

TEXTS = [f"def f{i}(x):\n    return {'x' * (i % 7)}\n" for i in range(12)]


@pytest.fixture(scope="module")
def stores(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TokenDocuments, TokenDocuments]:
    """The same documents in memory and in ArrayRecord shards."""
    documents = [Document(f"document {i}", text) for i, text in enumerate(TEXTS)]
    folder = tmp_path_factory.mktemp("tokens")
    writer = ShardWriter(folder, tokenizer, shard_bytes=200)
    for document in encode_documents(((d, False) for d in documents), tokenizer):
        writer.add(*document)
    writer.finish(bytes=0, content_hash="", validation_fraction=0.5, split_rate=0.0)
    return tokenize(documents, tokenizer, 320), TokenFolder(folder)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**63),
    length=st.integers(2, 40),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    isolate=st.booleans(),
    weights=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    start=st.integers(0, 500),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    resumed_after=st.integers(0, 5),
    readers=st.sampled_from([0, 1, 3]),
)
def test_a_batch_is_a_function_of_seed_and_consumed_rows_whatever_the_rows_are(
    tokenizer: Tokenizer,
    stores: tuple[TokenDocuments, TokenDocuments],
    seed: int,
    length: int,
    rate: float,
    isolate: bool,
    weights: list[int],
    start: int,
    sizes: list[int],
    resumed_after: int,
    readers: int,
) -> None:
    fim = fim_of(tokenizer, rate)

    def make(store: TokenDocuments) -> Rows | Mixture:
        sources = [Rows(store, length, seed + i, fim, isolate) for i in range(len(weights))]
        return Mixture(sources, weights) if len(weights) > 1 else sources[0]

    in_memory, on_disk = map(make, stores)
    firsts = [start + sum(sizes[:i]) for i in range(len(sizes))]
    expected = [_stacked(in_memory, first, size) for first, size in zip(firsts, sizes, strict=True)]
    resumed_after = min(resumed_after, len(sizes) - 1)
    loaded = load(on_disk, firsts[resumed_after], sizes[resumed_after:], readers)
    for batch, wanted in zip(loaded, expected[resumed_after:], strict=True):
        assert_same(batch, wanted)


def _stacked(rows: Rows | Mixture, first: int, size: int) -> Batch:
    """The definition, row by row; read backwards, as order must not count."""
    found = [rows[first + i] for i in reversed(range(size))][::-1]
    segments = None if found[0].segments_T is None else np.stack([r.segments_T for r in found])
    tokens, labels = (np.stack(arrays) for arrays in list(zip(*found, strict=True))[:2])
    return Batch(tokens, labels, segments)
