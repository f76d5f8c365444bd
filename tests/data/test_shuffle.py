"""Row orders are permutations, cheap for few rows too, and the same on every machine."""

import time

import pytest
from grain.experimental import index_shuffle

from dsv3_jax.data.shuffle import SMALL, shuffled


@pytest.mark.parametrize("count", [1, 2, 9, SMALL, SMALL + 1, 1000])
def test_every_position_is_taken_once(count: int) -> None:
    assert sorted(shuffled(i, count, key=2**63 + 1) for i in range(count)) == list(range(count))


def test_keys_give_different_orders() -> None:
    for count in (9, 200):
        orders = {tuple(shuffled(i, count, key) for i in range(count)) for key in range(6)}
        assert len(orders) == 6


def test_many_rows_keep_grains_order_and_few_rows_their_own() -> None:
    key = 2**40 + 123
    for count in (SMALL + 1, 1000):
        places = range(0, count, 7)
        expected = [index_shuffle(i, count - 1, seed=123, rounds=4) for i in places]
        assert [shuffled(i, count, key) for i in places] == expected
    assert [shuffled(i, 10, key=0) for i in range(10)] == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_few_rows_take_no_walk_through_a_cycle() -> None:
    start = time.perf_counter()
    for i in range(300):
        shuffled(i % 3, 3, key=i)
    assert time.perf_counter() - start < 0.5  # the walk takes over 10 ms a row
