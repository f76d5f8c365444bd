"""Rows stacked into batches and read ahead with grain (report 4.1).

A batch is a function of (rows, consumed rows, its size) alone. `batch_at` is the definition; `load`
gives the same batches in order, prepared by reader threads while the device computes. Threads, not
processes: a row is a few slices of an array or a few records of a file, cheaper than sending it to
another process.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.mixture import Mixture
from dsv3_jax.data.packing import Row, Rows

# Read ahead at most this many rows, and this many tokens (32 MiB of tokens and labels).
_AHEAD_ROWS = 256
_AHEAD_TOKENS = 2**22


class Batch(NamedTuple):
    """`labels_BT[b, t]` is the token after `tokens_BT[b, t]`; -1 is not counted in any loss.

    NumPy arrays on their way from the loader, JAX arrays in the training step.
    """

    tokens_BT: np.ndarray
    """int32 [B, T]"""
    labels_BT: np.ndarray
    """int32 [B, T]"""
    segments_BT: np.ndarray | None = None
    """Of isolated rows: number of each token's document within its row, from 0, where attention
    sees equal numbers only; int32 [B, T]
    """


def batch_at(rows: Rows | Mixture, consumed_rows: int, num_rows: int) -> Batch:
    """The batch of `num_rows` rows that follows the first `consumed_rows`."""
    return stack([rows[consumed_rows + i] for i in range(num_rows)])


def load(
    rows: Rows | Mixture, consumed_rows: int, batch_sizes: Iterable[int], readers: int = 1
) -> Iterator[Batch]:
    """One batch for each of `batch_sizes`, from `consumed_rows` on.

    Args:
        batch_sizes: in rows; taken one by one, may be endless.
        readers: threads that read ahead; 0 reads on demand. The batches do not depend on it.
    """
    import grain  # a slow import, and it brings in JAX

    ahead = max(readers, min(_AHEAD_ROWS, _AHEAD_TOKENS // rows.length))
    options = grain.ReadOptions(num_threads=readers, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(_RowsFrom(rows, consumed_rows)).to_iter_dataset(options)
    iterator = iter(dataset)
    try:
        for num_rows in batch_sizes:
            yield stack([next(iterator) for _ in range(num_rows)])
    finally:
        iterator.close()


class _RowsFrom:
    """The rows from `start` on, as grain's random-access source; practically endless."""

    def __init__(self, rows: Rows | Mixture, start: int) -> None:
        self._rows = rows
        self._start = start

    def __len__(self) -> int:
        return sys.maxsize - self._start

    def __getitem__(self, index: int) -> Row:
        return self._rows[self._start + index]


def stack(batch: Sequence[Row]) -> Batch:
    """Rows as a batch."""
    assert batch, "a batch of 0 rows"
    tokens, labels, segments = zip(*batch, strict=True)
    isolated = segments[0] is not None
    return Batch(np.stack(tokens), np.stack(labels), np.stack(segments) if isolated else None)
