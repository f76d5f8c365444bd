"""First fit is what its name says."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.first_fit import first_fit


def naive(sizes: list[int], capacity: int) -> list[int]:
    """The definition."""
    room, bins = [], []
    for size in sizes:
        place = next((i for i, left in enumerate(room) if left >= size), len(room))
        room += [capacity] * (place == len(room))
        room[place] -= size
        bins.append(place)
    return bins


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(sizes=st.lists(st.integers(1, 12), max_size=40))
def test_each_item_goes_into_the_first_bin_with_room(sizes):
    assert first_fit(sizes, 12) == naive(sizes, 12)
