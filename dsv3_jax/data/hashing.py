"""Decisions that are a function of a key, the same on every machine and in every run.

Raw words of a bit generator never change with NumPy's version; its distributions may.
"""

import hashlib

import numpy as np

WORDS_PER_BLOCK = 4
"""Words that Philox gives for one value of its counter"""


def key64(purpose: str, seed: int, epoch: int) -> int:
    """64 bits for one purpose, seed and epoch."""
    text = f"{purpose} {int(seed)} {int(epoch)}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def words(key: int, count: int) -> np.ndarray:
    """The first `count` random words of a key, uint64; word i is a function of (key, i)."""
    return np.random.Philox(key=key).random_raw(count)


def unit(words: np.ndarray) -> np.ndarray:
    """Words as numbers in [0, 1), float64: 53 bits, so that rounding never reaches 1.0."""
    return (words >> np.uint64(11)) / 2.0**53
