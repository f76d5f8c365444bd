"""Batches are a function of consumed rows alone: any start, any sizes, any number of readers."""

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dsv3_jax.data.loader import Batch, batch_at, load
from dsv3_jax.data.packing import Rows, TokenizedCorpus


@pytest.fixture
def rows() -> Rows:
    """1125 rows of 8 tokens an epoch; shuffling much fewer is slow, as it walks a 16-bit cycle."""
    lengths = np.arange(10, 135)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    return Rows(TokenizedCorpus(tokens, offsets), 8, seed=1)


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.tokens_BT, expected.tokens_BT)
    np.testing.assert_array_equal(found.labels_BT, expected.labels_BT)


def test_a_batch_is_its_rows_stacked(rows: Rows) -> None:
    batch = batch_at(rows, 3, 5)
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (5, 8)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == np.int32
    for i in range(5):
        np.testing.assert_array_equal(batch.tokens_BT[i], rows[3 + i].tokens_T)
        np.testing.assert_array_equal(batch.labels_BT[i], rows[3 + i].labels_T)


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
