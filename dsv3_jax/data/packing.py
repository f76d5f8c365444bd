"""Whole documents end to end, cut into rows of one length, no mask in between (report 4.1).

A document is `bos text eos`: the report ends documents with eos, and the published tokenizer puts
bos before every text at inference, so bos is trained in the place where it will stand. An epoch is
the stream `eos, document, document, …` in a shuffled order; the leading eos lets the first token be
predicted as well, so each token of the corpus is a label exactly once an epoch. Rows are random
access: row i is a function of (corpus, length, seed, i), whatever was read before.
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.cache import cache_folder, hash_texts, store
from dsv3_jax.data.sources import Document, content_hash
from dsv3_jax.data.tokenizer import Tokenizer

# Part of the cache key: raise it when the same documents and tokenizer give other tokens.
_FORMAT_VERSION = 1
# Documents encoded at a time: keeps all threads busy and bounds the memory of their encodings.
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Document d is `tokens[offsets[d]:offsets[d + 1]]`, its bos and eos included."""

    tokens: np.ndarray
    """int32 [N]"""
    offsets: np.ndarray
    """int64 [documents + 1]"""

    def __post_init__(self) -> None:
        assert self.tokens.dtype == np.int32, self.tokens.dtype
        assert self.offsets.dtype == np.int64, self.offsets.dtype
        ends = self.offsets[0], self.offsets[-1]
        assert ends == (0, len(self.tokens)), (ends, len(self.tokens))
        assert len(self.offsets) > 1, "no documents"
        assert (np.diff(self.offsets) > 0).all(), "an empty document: eos is missing"

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return int(self.tokens[-1])


class Row(NamedTuple):
    """`labels_T[t]` is the token that follows `tokens_T[t]`, or -1 where there is none."""

    tokens_T: np.ndarray
    """int32 [T]"""
    labels_T: np.ndarray
    """int32 [T]"""


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, max_ids: int) -> TokenizedCorpus:
    """The documents as ids, each between bos and eos (one separator if the tokenizer has only eos).

    ValueError if the tokenizer has more than `max_ids` ids (the model's vocabulary), or loses any
    byte of a document.
    """
    if tokenizer.vocab_size > max_ids:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids; "
            f"model.vocab_size is {max_ids}; allowed: at least as many as the tokenizer has"
        )
    if not documents:
        raise ValueError("data.source: 0 documents to tokenize; allowed: at least 1")
    eos = np.array([tokenizer.eos_id], np.int32)
    bos = np.array([tokenizer.bos_id], np.int32)
    opening = () if tokenizer.bos_id == tokenizer.eos_id else (bos,)
    pieces = []
    for start in range(0, len(documents), _CHUNK):
        chunk = documents[start : start + _CHUNK]
        encoded = tokenizer.encode_batch([document.text for document in chunk])
        for document, ids in zip(chunk, encoded, strict=True):
            _check_lossless(document, ids, tokenizer)
            pieces.append(np.concatenate([*opening, ids, eos]))
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return TokenizedCorpus(np.concatenate(pieces), offsets)


def cached_tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    max_ids: int,
    cache_dir: str | Path | None = None,
) -> TokenizedCorpus:
    """`tokenize`, once: kept by content hash in `cache_dir` or the user's cache folder."""
    folder = cache_folder(cache_dir)
    if folder is None or tokenizer.vocab_size > max_ids:
        return tokenize(documents, tokenizer, max_ids)
    version = f"format {_FORMAT_VERSION}"
    key = hash_texts((version, tokenizer.content_hash, content_hash(documents)))
    path = folder / "tokens" / f"{key}.npz"
    corpus = _read_corpus(path)
    if corpus is None:
        corpus = tokenize(documents, tokenizer, max_ids)
        file = io.BytesIO()
        np.savez(file, tokens=corpus.tokens, offsets=corpus.offsets)
        store(path, file.getvalue())
    return corpus


class Rows:
    """Rows of `length` labels, for every i >= 0: row i belongs to epoch i // len(rows).

    With a seed, each epoch has its own order of documents and of rows; with None every epoch is in
    the order of the corpus (validation). The last row of the stream is filled up with eos whose
    labels are -1. ValueError for a length below 1.
    """

    def __init__(self, corpus: TokenizedCorpus, length: int, seed: int | None = None) -> None:
        if length < 1:
            raise ValueError(f"row length is {length} tokens; allowed: at least 1")
        self.corpus = corpus
        self.length = length
        self.seed = seed
        self._num_rows = -(-len(corpus.tokens) // length)
        make_epoch = functools.partial(_epoch, np.diff(corpus.offsets), seed)
        # Two epochs: readers work on both sides of the boundary at the same time.
        self._epoch = functools.lru_cache(maxsize=2)(make_epoch)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return self._num_rows

    def __getitem__(self, index: int) -> Row:
        assert index >= 0, index
        epoch, position = divmod(index, len(self))
        first = self._shuffled(epoch, position) * self.length
        last = min(first + self.length, len(self.corpus.tokens))
        # What precedes the row, then the row; eos before the first row and after the last.
        window = np.full(self.length + 1, self.corpus.eos_id, np.int32)
        start = 1 if first == 0 else 0
        stop = last - first + 1
        window[start:stop] = self._read(self._epoch(epoch), first - 1 + start, last)
        labels_T = window[1:].copy()
        labels_T[last - first :] = -1
        return Row(window[:-1], labels_T)

    def __iter__(self) -> Iterator[Row]:
        """The rows of the first epoch."""
        return (self[index] for index in range(len(self)))

    def _shuffled(self, epoch: int, position: int) -> int:
        """The row of the stream that is read at `position`: a keyed permutation, no table."""
        if self.seed is None:
            return position
        from grain.experimental import index_shuffle  # a slow import, and it brings in JAX

        assert len(self) <= 2**32, f"{len(self)} rows; index_shuffle counts in 32 bits"
        key = _key64("rows", self.seed, epoch) % 2**32
        return index_shuffle(position, max_index=len(self) - 1, seed=key, rounds=4)

    def _read(self, epoch: tuple[np.ndarray, np.ndarray], first: int, last: int) -> np.ndarray:
        """Corpus tokens [first, last) of the epoch's stream (its leading eos not counted)."""
        order, starts = epoch
        begin = int(np.searchsorted(starts, first, side="right")) - 1
        end = int(np.searchsorted(starts, last, side="left"))
        pieces = []
        for place in range(begin, end):
            offset = self.corpus.offsets[order[place]] - starts[place]
            stop = min(last, starts[place + 1])
            pieces.append(self.corpus.tokens[max(first, starts[place]) + offset : stop + offset])
        return np.concatenate(pieces)


def _epoch(lengths: np.ndarray, seed: int | None, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): documents in the epoch's order, and where each starts in its stream."""
    order = np.arange(len(lengths))
    if seed is not None:
        # Raw words of a bit generator never change with NumPy's version; its `permutation` may.
        bits = np.random.Philox(key=_key64("documents", seed, epoch))
        order = np.argsort(bits.random_raw(len(lengths)), kind="stable")
    return order, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[order])])


def _check_lossless(document: Document, ids: np.ndarray, tokenizer: Tokenizer) -> None:
    text = document.text.encode()
    kept = b"".join([tokenizer.token_bytes[i] for i in ids.tolist()])
    if kept == text:
        return
    pairs = enumerate(zip(text, kept, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(kept)))
    raise ValueError(
        f"tokenizer {tokenizer.name} does not keep document {document.name}: at byte {at} "
        f"the text has {text[at : at + 16]!r}, its tokens {kept[at : at + 16]!r}; "
        "allowed: tokenizers that keep every byte"
    )


def _read_corpus(path: Path) -> TokenizedCorpus | None:
    """What the cache holds, or None if it holds nothing whole; the archive's own checksums tell."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return TokenizedCorpus(arrays["tokens"], arrays["offsets"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _key64(purpose: str, seed: int, epoch: int) -> int:
    """64 bits that are the same on every machine and in every run."""
    text = f"{purpose} {int(seed)} {int(epoch)}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
