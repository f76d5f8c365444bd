"""Keyed words: the same on every machine, each a function of its key and number alone."""

import numpy as np

from dsv3_jax.data.hashing import WORDS_PER_BLOCK, key64, unit, words


def test_words_are_the_same_everywhere() -> None:
    assert words(key64("documents", 7, 3), 2).tolist() == [
        16933805894621846435,
        13643078080357075530,
    ]


def test_a_block_of_words_is_a_function_of_its_number() -> None:
    together = words(11, 10 * WORDS_PER_BLOCK).reshape(10, WORDS_PER_BLOCK)
    for number in range(10):
        block = np.random.Philox(key=11, counter=number).random_raw(WORDS_PER_BLOCK)
        np.testing.assert_array_equal(block, together[number])


def test_purpose_seed_and_epoch_all_count() -> None:
    keys = {key64(p, s, e) for p in ("rows", "fim") for s in (0, 1, 2**63) for e in (0, 1)}
    assert len(keys) == 12


def test_units_are_spread_over_zero_to_one() -> None:
    numbers = unit(words(1, 10_000))
    assert abs(numbers.mean() - 0.5) < 0.02
    assert unit(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0.0, 1 - 2.0**-53]
