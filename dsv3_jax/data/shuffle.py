"""The order of the rows of an epoch: a keyed permutation with random access.

grain's `index_shuffle` needs no table, but it looks for each result in a cycle through at least
2^16 numbers: for n rows it takes 2^16 / n steps, 10 ms for ten rows. Few rows get a table instead.
"""

import numpy as np

from dsv3_jax.data.hashing import words

# Up to here a table is made for each row anew, in some 20 microseconds.
SMALL = 64


def shuffled(position: int, count: int, key: int) -> int:
    """What stands at `position` of a permutation of 0..count-1 that the 64-bit key names."""
    assert 0 <= position < count, (position, count)
    if count <= SMALL:
        return int(np.argsort(words(key, count), kind="stable")[position])
    from grain.experimental import index_shuffle  # a slow import, and it brings in JAX

    assert count <= 2**32, f"{count} rows; index_shuffle counts in 32 bits"
    return index_shuffle(position, max_index=count - 1, seed=key % 2**32, rounds=4)
