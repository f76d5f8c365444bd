"""Shares hold to within one row after every row; every row of every source comes in its turn."""

import collections
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.mixture import MAX_PERIOD, Mixture, parts_of
from dsv3_jax.data.packing import Rows
from tests.data.corpora import corpus_of


def mixture_of(weights: list[float], isolate: bool = False) -> Mixture:
    sources = [
        Rows(corpus_of(*range(1, 9 + place)), 4, seed=place, isolate=isolate)
        for place in range(len(weights))
    ]
    return Mixture(sources, weights)


def slow_schedule(parts: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """The definition: of all sources whose next row is not too early, the one whose last possible
    place comes first; in fractions, without periods.
    """
    shares = [Fraction(part, sum(parts)) for part in parts]
    given, found = [0] * len(parts), []
    for place in range(count):
        due = [s for s, w in enumerate(shares) if w and given[s] < w * (place + 1)]
        source = min(due, key=lambda s: -(-(given[s] + 1) // shares[s]))
        found.append((source, given[source]))
        given[source] += 1
    return found


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any))
def test_shares_are_exact_to_within_one_row_at_every_prefix(parts: list[int]) -> None:
    mixture = mixture_of([float(part) for part in parts])
    period = sum(mixture.parts)
    places = [mixture.locate(i) for i in range(2 * period + 3)]
    assert places == slow_schedule(mixture.parts, len(places))
    sources = np.array([source for source, _ in places])
    for source, part in enumerate(parts):
        given = np.cumsum(sources == source)
        wanted = Fraction(part, sum(parts))
        assert all(abs(int(n) - wanted * (k + 1)) < 1 for k, n in enumerate(given))
        rows = [row for s, row in places if s == source]
        assert rows == list(range(len(rows)))


@pytest.mark.parametrize("weights", [[0.62, 0.3, 0.0799, 0.0001], [0.31415] * 3 + [0.05755]])
def test_shares_hold_beyond_a_million_rows(weights: list[float]) -> None:
    mixture = mixture_of(weights)
    exact = [Fraction(repr(weight)) for weight in weights]
    for k in (1_000_000, 10**12 + 7):
        last = {}
        for index in range(max(k - MAX_PERIOD, 0), k):
            source, row = mixture.locate(index)
            last[source] = row + 1
        for source, weight in enumerate(exact):
            assert abs(last[source] - k * weight / sum(exact)) < 1


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((0.7, 0.2, 0.1), (7, 2, 1)),
        ((1 / 3, 2 / 3), (1, 2)),
        ((3,), (1,)),
        ((0.0, 5.0), (0, 1)),
        ((1e-5, 1.0), (1, 99_999)),
        ((0.123456789, 0.5), (19_802, 80_198)),
        ((1e-12, 1.0), (1, 100_000)),
    ],
)
def test_weights_become_whole_rows_of_a_period(
    weights: tuple[float, ...], parts: tuple[int, ...]
) -> None:
    found = parts_of(weights)
    assert np.allclose(np.array(found) / sum(found), np.array(parts) / sum(parts), atol=1e-9)
    assert sum(found) <= MAX_PERIOD + len(weights)


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.weights sum to 0; allowed: at least one above 0"):
        parts_of((0.0, 0))


def test_every_source_goes_through_its_own_epochs() -> None:
    mixture = mixture_of([0.5, 0.3, 0.2])
    seen = collections.defaultdict(list)
    for index in range(200):
        source, _ = mixture.locate(index)
        seen[source].append(mixture[index])
    for source, rows in enumerate(mixture.sources):
        for place, row in enumerate(seen[source]):
            np.testing.assert_array_equal(row.tokens_T, rows[place].tokens_T)
            np.testing.assert_array_equal(row.labels_T, rows[place].labels_T)
        epoch = np.concatenate([row.labels_T for row in seen[source][: len(rows)]])
        assert sorted(epoch[epoch >= 0]) == sorted(rows.corpus.tokens)


def test_length_and_names_are_those_of_the_sources() -> None:
    mixture = mixture_of([0.5, 0.0, 0.5])
    assert mixture.length == 4
    assert len(mixture) == len(mixture.sources[0]) + len(mixture.sources[2])
    for index in range(10):
        source, row = mixture.locate(index)
        assert mixture.names_of(index) == mixture.sources[source].names_of(row)
