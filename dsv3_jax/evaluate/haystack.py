"""The text that needles are hidden in: whole documents as one long row of tokens."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import TextsHash
from dsv3_jax.data.documents import Document
from dsv3_jax.data.held_out import is_held_out
from dsv3_jax.data.sources import iterate_documents
from dsv3_jax.data.tokenizer import Tokenizer

# Of longer texts the beginning is enough: rows of it are drawn, not gone through.
MOST_TOKENS = 2**22
SEPARATOR = "\n\n"  # behind each document: nothing tells a model that what was before is over


class Haystack:
    """Documents end to end, without special tokens.

    Attributes:
        name: what messages call it.
        content_hash: SHA-256 of the documents' texts, in hexadecimal.
    """

    def __init__(self, name: str, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        """Reads up to `MOST_TOKENS`. ValueError if there is no text."""
        self.name = name
        pieces, digest, total = [], TextsHash(), 0
        for document in documents:
            digest.add(document.text.encode())
            pieces.append(tokenizer.encode(document.text + SEPARATOR))
            total += len(pieces[-1])
            if total >= MOST_TOKENS:
                break
        if not total:
            raise ValueError(f"--haystack {name}: no text")
        self.content_hash = digest.hexdigest()
        self._tokens_N = np.concatenate(pieces)
        self._starts = np.cumsum([0, *map(len, pieces[:-1])])

    def __len__(self) -> int:
        """Tokens."""
        return len(self._tokens_N)

    @property
    def documents(self) -> int:
        return len(self._starts)

    def stretch(self, document: int, count: int) -> np.ndarray:
        """The first `count` tokens from a document's beginning on, int32; behind the last document
        comes the first. ValueError if there are not so many.
        """
        if count > len(self):
            raise ValueError(
                f"--haystack {self.name}: {len(self):,} tokens, and {count:,} of text are needed; "
                "allowed: a longer text, or shorter --lengths"
            )
        start = self._starts[document]
        return np.concatenate([self._tokens_N[start:], self._tokens_N[:start]])[:count]


def open_haystack(path: Path | None, tokenizer: Tokenizer, longest: int) -> Haystack:
    """A user's text, JSONL or Parquet file; or without one the interpreter's standard library: the
    documents that training on it holds out, and others if these have fewer than `longest` tokens.

    ValueError for a file that cannot be read.
    """
    if path is not None:
        try:
            return Haystack(str(path), iterate_documents(str(path)), tokenizer)
        except ValueError as error:
            said, _, _ = str(error).partition(", or ")  # what follows is for training
            raise ValueError(said.replace("data.source", "--haystack")) from None
    fraction = DataConfig.validation_fraction
    sides: tuple[list[Document], list[Document]] = [], []
    for document in iterate_documents("stdlib"):
        sides[is_held_out(document.text, fraction)].append(document)
    others, held_out = sides
    found = Haystack("stdlib, held-out documents", held_out, tokenizer)
    if len(found) >= longest:
        return found
    return Haystack("stdlib, held-out documents first", chain(held_out, others), tokenizer)
