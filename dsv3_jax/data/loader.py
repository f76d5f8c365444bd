"""Rows stacked into batches and read ahead with grain (report 4.1).

A batch is a function of (rows, consumed rows, its size) alone. `batch_at` is the definition; `load`
gives the same batches in order, prepared by reader threads while the device computes. Threads, not
processes: a row is a few slices of an array or a few records of a file, cheaper than sending it to
another process.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # who only steps on batches needs no tokenizer
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
    weights_BT: np.ndarray | None = None
    """Of reinforcement learning: a factor of any sign for -log p of each label in the loss; float32
    [B, T], float64 in a run of float64
    """


def batch_at(rows: "Rows | Mixture", consumed_rows: int, num_rows: int) -> Batch:
    """The batch of `num_rows` rows that follows the first `consumed_rows`."""
    return stack([rows[consumed_rows + i] for i in range(num_rows)])


def load(
    rows: "Rows | Mixture",
    consumed_rows: int,
    batch_sizes: Iterable[int],
    readers: int = 1,
    own: Callable[[int], Sequence[int]] = range,
) -> Generator[Batch, None, None]:
    """One batch for each of `batch_sizes`, from `consumed_rows` on.

    Args:
        batch_sizes: in rows; taken one by one, may be endless.
        readers: threads that read ahead; 0 reads on demand. The batches do not depend on it.
        own: of a batch of so many rows, those that are made, in order; by default all.
    """
    size, iterator = 0, None
    try:
        for num_rows in batch_sizes:
            if num_rows != size:  # of another batch other rows are read ahead
                if iterator:
                    iterator.close()
                size, chosen = num_rows, own(num_rows)
                iterator = _read_ahead(_RowsFrom(rows, consumed_rows, size, chosen), readers)
            consumed_rows += size
            yield stack([next(iterator) for _ in chosen])
    finally:
        if iterator:
            iterator.close()


class _RowsFrom:
    """Chosen rows of each of the batches from `start` on, as grain's random-access source;
    practically endless.
    """

    def __init__(
        self, rows: "Rows | Mixture", start: int, batch_size: int, chosen: Sequence[int]
    ) -> None:
        self.length = rows.length
        self._rows, self._start = rows, start
        self._batch_size, self._chosen = batch_size, chosen

    def __len__(self) -> int:
        batches = (sys.maxsize - self._start) // self._batch_size
        return batches * len(self._chosen)

    def __getitem__(self, index: int) -> "Row":
        batch, place = divmod(index, len(self._chosen))
        return self._rows[self._start + batch * self._batch_size + self._chosen[place]]


def load_grain() -> ModuleType:
    """Imports grain, which takes half a second and brings in JAX."""
    import grain

    return grain


def _read_ahead(source: _RowsFrom, readers: int) -> Any:
    """Grain's iterator over a source."""
    grain = load_grain()
    ahead = max(readers, min(_AHEAD_ROWS, _AHEAD_TOKENS // source.length))
    options = grain.ReadOptions(num_threads=readers, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def stack(batch: "Sequence[Row]") -> Batch:
    """Rows as a batch."""
    assert batch, "a batch of 0 rows"
    tokens, labels, segments = zip(*batch, strict=True)
    isolated = segments[0] is not None
    return Batch(np.stack(tokens), np.stack(labels), np.stack(segments) if isolated else None)
