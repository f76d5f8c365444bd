"""First fit: items of some sizes into bins of one capacity, each into the first that has room.

A tree holds the largest room below each of its nodes, so an item costs a walk down and one up, and
a million samples some seconds.
"""

from collections.abc import Sequence


def first_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """The bin of each item; bins are numbered as they are opened.

    No two bins could be one: of any two, what lies in the later one did not fit into the earlier.
    """
    assert all(0 < size <= capacity for size in sizes), "an item that fits into no bin"
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins = []
    for size in sizes:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < size  # else the first half has a bin with room
        bins.append(node - leaves)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
