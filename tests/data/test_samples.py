"""Rows hold every sample once an epoch, whole and isolated, and are a function of their number."""

import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.answers import Sample
from dsv3_jax.data.loader import batch_at, load
from dsv3_jax.data.packing import Row
from dsv3_jax.data.samples import SampleRows, Samples
from tests.data.corpora import EOS

# Row -> start of the SHA-256 of its tokens, labels and segments
GOLDEN = {0: "187e8482b9cbe207", 7: "8ebdfdfc4eab1d7f", 500: "9d663f44cd81f8bc"}


def samples_of(*lengths: int) -> Samples:
    """Of tokens that all differ; every third one, and the last of a sample, is an answer's."""
    made, first = [], 10
    for length in lengths:
        tokens = np.arange(first, first + length, dtype=np.int32)
        answer = tokens % 3 == 0
        answer[-1] = True
        made.append(Sample(tokens, answer))
        first += length
    return Samples(made, [f"s:{i}" for i in range(len(made))], EOS)


def pieces_of(row: Row) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs and labels of each segment."""
    assert (np.diff(row.segments_T) >= 0).all()
    return [
        (tuple(row.tokens_T[own].tolist()), tuple(row.labels_T[own].tolist()))
        for own in (row.segments_T == s for s in range(row.segments_T[-1] + 1))
    ]


LENGTHS = st.lists(st.integers(2, 13), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS, seed=st.none() | st.integers(0, 2**32 - 1))
def test_an_epoch_holds_every_sample_once_and_whole(lengths, seed):
    samples = samples_of(*lengths)
    rows, first = SampleRows(samples, 12, seed), 0
    for epoch in range(3):
        count = rows.rows_of_epoch(epoch)
        found = collections.Counter()
        for index in range(first, first + count):
            *own, fill = pieces_of(rows[index])
            if sum(len(tokens) for tokens, _ in own) == 12 - len(fill[0]) and EOS in fill[0]:
                assert set(fill[0]) == {EOS}
                assert set(fill[1]) == {-1}
            else:
                own = [*own, fill]
            found.update(own)
            assert len(rows.names_of(index)) == len(own)
        expected = collections.Counter()
        for s in range(len(samples)):
            part = slice(samples.offsets[s], samples.offsets[s + 1])
            tokens, answer = samples.tokens[part].tolist(), samples.answers[part].tolist()
            labels = [t if a else -1 for t, a in zip(tokens[1:], answer[1:], strict=True)]
            expected[tuple(tokens[:-1]), tuple(labels)] += 1
        assert found == expected
        first += count
    assert rows.rows_of_epochs(3) == first


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1))
def test_no_sample_would_fit_into_an_earlier_row(lengths, seed):
    """In the order in which rows were opened."""
    samples = samples_of(*lengths)
    packing = SampleRows(samples, 12, seed)._packing(0)
    held = [packing.order[a:b] for a, b in zip(packing.starts, packing.starts[1:], strict=False)]
    room = [12 - int(samples.places[own].sum()) for own in held]
    for r, own in enumerate(held):
        assert all(samples.places[s] > room[before] for s in own for before in range(r))


def test_labels_are_counted_as_they_are_learned():
    samples = samples_of(2, 5, 9, 3)
    labels = sum(int((row.labels_T >= 0).sum()) for row in SampleRows(samples, 12))
    assert samples.num_labels == labels


def test_epochs_differ_and_seeds_differ_and_validation_keeps_its_order():
    samples = samples_of(*[3] * 40)
    rows, other = SampleRows(samples, 12, 1), SampleRows(samples, 12, 2)

    def names(of: SampleRows, first: int = 0) -> list[str]:
        return [name for row in range(first, first + 7) for name in of.names_of(row)]

    assert names(rows) != names(rows, 7) != names(other) != names(rows)
    plain = SampleRows(samples, 12)
    assert names(plain) == samples.names
    np.testing.assert_array_equal(plain[0].tokens_T, plain[7].tokens_T)


def test_rows_do_not_depend_on_what_was_read_before():
    """So that a resumed run sees what one that never stopped does."""
    samples = samples_of(*np.random.default_rng(0).integers(2, 13, 60).tolist())
    rows, fresh = SampleRows(samples, 12, 3), SampleRows(samples, 12, 3)
    batches = list(zip(load(rows, 0, [4] * 30, readers=2), range(0, 120, 4), strict=True))
    for batch, consumed in reversed(batches):
        twin = batch_at(fresh, consumed, 4)
        for one, two in zip(batch, twin, strict=True):
            np.testing.assert_array_equal(one, two)


def test_the_order_of_rows_is_the_same_for_ever():
    """Another order would be another run."""
    samples = samples_of(*[3, 9, 5, 12, 2, 7, 6, 4] * 12)
    rows = SampleRows(samples, 12, 5)
    found = {
        index: hashlib.sha256(b"".join(x.tobytes() for x in rows[index])).hexdigest()[:16]
        for index in GOLDEN
    }
    assert found == GOLDEN


def test_a_sample_that_is_longer_than_a_row_is_no_row():
    with pytest.raises(ValueError, match="a sample takes 13 places; allowed: at most 12"):
        SampleRows(samples_of(3, 14), 12)
