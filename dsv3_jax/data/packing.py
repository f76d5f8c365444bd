"""Whole documents end to end, cut into rows of one length (report 4.1).

An epoch is the stream `eos, document, document, …` in a shuffled order; the leading eos lets the
first token be predicted as well, so each token of the corpus is a label exactly once an epoch. Rows
are random access: row i is a function of (corpus, length, seed, i), whatever was read before.
Documents of one row see each other, as in the report's pre-training; isolated rows (report 5.1)
number them, so that attention can keep them apart, and never predict one from another.
"""

import bisect
import functools
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.fim import ADDED, Fim
from dsv3_jax.data.hashing import key64, words
from dsv3_jax.data.recent import RecentDocuments
from dsv3_jax.data.shuffle import shuffled
from dsv3_jax.data.tokenised import TokenDocuments

# A document of more rows is kept when it is read: it is stored as one record, which is read, and
# rearranged, as a whole, so its rows would cost the square of its length.
_LONG_ROWS = 16
# Of long documents that are kept, 2^26 tokens.
_KEPT_BYTES = 2**28


class Row(NamedTuple):
    """`labels_T[t]` is the token that follows `tokens_T[t]`, or -1 where there is none."""

    tokens_T: np.ndarray
    """int32 [T]"""
    labels_T: np.ndarray
    """int32 [T]"""
    segments_T: np.ndarray | None = None
    """Of isolated rows: number of the document within the row, from 0; what fills the row up after
    the last document counts as one more. int32 [T]
    """


class Stream(NamedTuple):
    """The documents of an epoch, one after the other."""

    order: np.ndarray
    """Documents in the epoch's order, int64 [documents]"""
    starts: np.ndarray
    """Where each of them starts, and the end; int64 [documents + 1]"""
    cuts: np.ndarray | None
    """`Fim.cuts` of each document, not in the epoch's order; None without fill-in-the-middle"""


class Rows:
    """Rows of `length` labels, for every i >= 0: the rows of epoch 0, then those of epoch 1, ….

    With a seed, each epoch has its own order of documents and of rows; with None every epoch is in
    the order of the corpus (validation). The last row of the stream is filled up with eos whose
    labels are -1. With fill-in-the-middle, epochs differ in size by a few tokens.

    Args:
        fim: fill-in-the-middle for a share of the documents; needs a seed.
        isolate: documents of a row do not see each other. Rows have `segments_T`, and a document's
            first token is nobody's label.

    ValueError for a length below 1.
    """

    def __init__(
        self,
        corpus: TokenDocuments,
        length: int,
        seed: int | None = None,
        fim: Fim | None = None,
        isolate: bool = False,
    ) -> None:
        if length < 1:
            raise ValueError(f"row length is {length} tokens; allowed: at least 1")
        assert fim is None or seed is not None, "validation text keeps its order"
        self.corpus = corpus
        self.length = length
        self.seed = seed
        self.isolate = isolate
        self._fim = fim
        self._lengths = np.asarray(corpus.lengths)
        self._num_tokens = int(self._lengths.sum())
        # First row of each epoch as far as it was needed; without fill-in-the-middle all are alike.
        self._first_rows = [0]
        self._growing = threading.Lock()
        # Two epochs: readers work on both sides of the boundary at the same time.
        self._stream = functools.lru_cache(maxsize=2)(self._make_stream)
        self._recent = RecentDocuments(_KEPT_BYTES)

    def __len__(self) -> int:
        """Rows in the first epoch."""
        return self.rows_of_epoch(0)

    def __getitem__(self, index: int) -> Row:
        stream, first = self._place(index)
        last = min(first + self.length, int(stream.starts[-1]))
        # What precedes the row, then the row; eos before the first row and after the last.
        window = np.full(self.length + 1, self.corpus.eos_id, np.int32)
        start = 1 if first == 0 else 0
        stop = last - first + 1
        window[start:stop] = self._read(stream, first - 1 + start, last)
        labels_T = window[1:].copy()
        labels_T[last - first :] = -1
        if not self.isolate:
            return Row(window[:-1], labels_T)
        # Place of each token's document in the stream; -1 before the first, one more at the end.
        places = np.arange(first - 1, first + self.length)
        places = np.searchsorted(stream.starts, places, side="right") - 1
        labels_T[places[1:] != places[:-1]] = -1
        return Row(window[:-1], labels_T, (places[:-1] - places[0]).astype(np.int32))

    def __iter__(self) -> Iterator[Row]:
        """The rows of the first epoch."""
        return (self[index] for index in range(len(self)))

    def names_of(self, index: int) -> list[str]:
        """Names of the documents whose tokens a row predicts, in its order."""
        stream, first = self._place(index)
        last = min(first + self.length, int(stream.starts[-1]))
        documents = stream.order[slice(*_touched(stream, first, last))]
        return [self.corpus.name_of(int(document)) for document in documents]

    def rows_of_epoch(self, epoch: int) -> int:
        """Rows in one epoch."""
        tokens = self._num_tokens
        if self._fim is not None:
            tokens += ADDED * int((self._cuts(epoch)[:, 0] >= 0).sum())
        return -(-tokens // self.length)

    def _place(self, index: int) -> tuple[Stream, int]:
        """A row's epoch, and where in its stream the row starts."""
        assert index >= 0, index
        epoch, position, count = self._locate(index)
        if self.seed is not None:
            position = shuffled(position, count, key64("rows", self.seed, epoch))
        return self._stream(epoch), position * self.length

    def _locate(self, index: int) -> tuple[int, int, int]:
        """(epoch, place in the epoch, rows of the epoch) of a row."""
        if self._fim is None:
            return *divmod(index, len(self)), len(self)
        with self._growing:
            firsts = self._first_rows
            while firsts[-1] <= index:
                firsts.append(firsts[-1] + self.rows_of_epoch(len(firsts) - 1))
        epoch = bisect.bisect_right(firsts, index) - 1
        return epoch, index - firsts[epoch], firsts[epoch + 1] - firsts[epoch]

    def _make_stream(self, epoch: int) -> Stream:
        lengths, cuts = self._lengths, None
        if self._fim is not None:
            cuts = self._cuts(epoch)
            lengths = lengths + ADDED * (cuts[:, 0] >= 0)
        order = np.arange(len(lengths))
        if self.seed is not None:
            drawn = words(key64("documents", self.seed, epoch), len(lengths))
            order = np.argsort(drawn, kind="stable")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[order])])
        return Stream(order, starts, cuts)

    def _cuts(self, epoch: int) -> np.ndarray:
        return self._fim.cuts(self._lengths, self.seed, epoch)

    def _read(self, stream: Stream, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of the epoch's stream (its leading eos not counted)."""
        pieces = []
        for place in range(*_touched(stream, first, last)):
            start = stream.starts[place]
            document = self._document(stream, int(stream.order[place]))
            pieces.append(document[max(first - start, 0) : last - start])
        return np.concatenate(pieces)

    def _document(self, stream: Stream, document: int) -> np.ndarray:
        cuts = () if stream.cuts is None else tuple(stream.cuts[document].tolist())
        if self._lengths[document] <= _LONG_ROWS * self.length:
            return self._read_document(document, cuts)
        return self._recent.get((document, cuts), lambda: self._read_document(document, cuts))

    def _read_document(self, document: int, cuts: tuple[int, ...]) -> np.ndarray:
        tokens = self.corpus.read(document)
        return self._fim.rearrange(tokens, *cuts) if cuts and cuts[0] >= 0 else tokens


def _touched(stream: Stream, first: int, last: int) -> tuple[int, int]:
    """Places [begin, end) of the documents that hold tokens [first, last) of a stream."""
    begin = int(np.searchsorted(stream.starts, first, side="right")) - 1
    return begin, int(np.searchsorted(stream.starts, last, side="left"))
