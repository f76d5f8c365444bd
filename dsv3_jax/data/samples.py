"""Samples to fine-tune on, in memory, and as rows: whole samples side by side, isolated (5.1).

A row holds as many samples as fit, each a segment of its own, so each is computed as if it were
alone. Packing is first fit over the epoch's order of samples: it and the order of rows are a
function of (samples, length, seed, epoch), so rows are random access as those of `packing`.
"""

import bisect
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.answers import Sample
from dsv3_jax.data.first_fit import first_fit
from dsv3_jax.data.hashing import key64, words
from dsv3_jax.data.packing import Row
from dsv3_jax.data.shuffle import shuffled


class Samples:
    """Sample s is tokens [offsets[s], offsets[s + 1])."""

    def __init__(self, samples: Sequence[Sample], names: Sequence[str], eos_id: int) -> None:
        assert len(samples) == len(names) > 0, (len(samples), len(names))
        self.tokens = np.concatenate([sample.tokens_N for sample in samples])
        self.answers = np.concatenate([sample.answer_N for sample in samples])
        self.offsets = np.cumsum([0, *(len(sample.tokens_N) for sample in samples)])
        self.names, self.eos_id = names, eos_id

    @property
    def places(self) -> np.ndarray:
        """That each takes in a row, int64 [samples]: its last token is a label only."""
        return np.diff(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Its inputs and its labels, -1 where no answer is predicted; int32 [places] each."""
        own = slice(self.offsets[sample], self.offsets[sample + 1])
        tokens, answer = self.tokens[own], self.answers[own]
        return tokens[:-1], np.where(answer[1:], tokens[1:], -1)

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted in an epoch."""
        firsts = self.answers[self.offsets[:-1]]  # of a sample: nothing stands before it
        return int(self.answers.sum()) - int(firsts.sum())


class _Packing(NamedTuple):
    """Row r of an epoch holds samples [starts[r], starts[r + 1]) of its order."""

    order: np.ndarray
    starts: np.ndarray


class SampleRows:
    """Rows of whole samples, for every i >= 0: the rows of epoch 0, then those of epoch 1, ….

    With a seed each epoch has its own order of samples, and so its own rows; with None every epoch
    is in the order of the samples (validation). Behind a row's last sample stands eos, in a segment
    of its own, with labels -1. ValueError for samples that are longer than a row.
    """

    def __init__(self, samples: Samples, length: int, seed: int | None = None) -> None:
        longest = int(samples.places.max())
        if longest > length:
            raise ValueError(f"a sample takes {longest} places; allowed: at most {length} of a row")
        self.samples, self.length, self.seed = samples, length, seed
        self._first_rows = [0]  # of each epoch as far as it was needed
        self._growing = threading.Lock()
        # Two epochs: readers work on both sides of the boundary at the same time.
        self._packing = functools.lru_cache(maxsize=2)(self._make_packing)

    def __len__(self) -> int:
        """Rows in the first epoch."""
        return self.rows_of_epoch(0)

    def __getitem__(self, index: int) -> Row:
        tokens_T = np.full(self.length, self.samples.eos_id, np.int32)
        labels_T = np.full(self.length, -1, np.int32)
        own, end = self._samples_of(index), 0
        segments_T = np.full(self.length, len(own), np.int32)
        for segment, sample in enumerate(own):
            tokens, labels = self.samples.read(int(sample))
            place = slice(end, end + len(tokens))
            tokens_T[place], labels_T[place], segments_T[place] = tokens, labels, segment
            end = place.stop
        return Row(tokens_T, labels_T, segments_T)

    def __iter__(self) -> Iterator[Row]:
        """The rows of the first epoch."""
        return (self[index] for index in range(len(self)))

    def names_of(self, index: int) -> list[str]:
        """Names of the samples of a row, in its order."""
        return [self.samples.names[int(sample)] for sample in self._samples_of(index)]

    def rows_of_epoch(self, epoch: int) -> int:
        """Rows in one epoch: some more or fewer in each, as its order packs."""
        return len(self._packing(epoch if self.seed is not None else 0).starts) - 1

    def rows_of_epochs(self, epochs: int) -> int:
        """Rows in the first so many."""
        return sum(self.rows_of_epoch(epoch) for epoch in range(epochs))

    def _samples_of(self, index: int) -> np.ndarray:
        assert index >= 0, index
        epoch, place, count = self._locate(index)
        packing = self._packing(epoch if self.seed is not None else 0)
        if self.seed is not None:
            place = shuffled(place, count, key64("rows", self.seed, epoch))
        return packing.order[packing.starts[place] : packing.starts[place + 1]]

    def _locate(self, index: int) -> tuple[int, int, int]:
        """(epoch, place in the epoch, rows of the epoch) of a row."""
        with self._growing:
            firsts = self._first_rows
            while firsts[-1] <= index:
                firsts.append(firsts[-1] + self.rows_of_epoch(len(firsts) - 1))
        epoch = bisect.bisect_right(firsts, index) - 1
        return epoch, index - firsts[epoch], firsts[epoch + 1] - firsts[epoch]

    def _make_packing(self, epoch: int) -> _Packing:
        order, places = np.arange(len(self.samples)), self.samples.places
        if self.seed is not None:
            drawn = words(key64("samples", self.seed, epoch), len(order))
            order = np.argsort(drawn, kind="stable")
        row_of = np.array(first_fit(places[order].tolist(), self.length))
        by_row = np.argsort(row_of, kind="stable")
        starts = np.searchsorted(row_of[by_row], np.arange(row_of.max() + 2))
        return _Packing(order[by_row], starts)
