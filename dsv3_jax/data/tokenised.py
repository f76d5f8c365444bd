"""Documents as tokens: how they are made, and what packing needs of them (report 4.1).

A document is `bos text eos`: the report ends documents with eos, and the published tokenizer puts
bos before every text at inference, so bos is trained in the place where it will stand.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from dsv3_jax.data.cache import hash_texts, store
from dsv3_jax.data.documents import Document, content_hash
from dsv3_jax.data.split_tokens import TokenSplitter
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import cache_folder

# Part of the cache key: raise it when the same documents and tokenizer give other tokens.
_FORMAT_VERSION = 1
# Documents encoded at a time: keeps all threads busy and bounds the memory of their encodings,
# which take some hundred bytes a token.
_CHUNK = 256
_CHUNK_CHARACTERS = 2**22


class TokenDocuments(Protocol):
    """Documents as tokens, in memory or on disk, each readable on its own by any thread."""

    lengths: np.ndarray
    """Tokens of each document, bos and eos included, all above 0; int64 [documents]"""
    eos_id: int
    """The id that ends every document"""

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document, int32 [lengths[document]]."""

    def name_of(self, document: int) -> str:
        """What messages call it."""


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """In memory; document d is `tokens[offsets[d]:offsets[d + 1]]`, its bos and eos included."""

    tokens: np.ndarray
    """int32 [N]"""
    offsets: np.ndarray
    """int64 [documents + 1]"""
    names: Sequence[str] = ()
    """Of the documents, or none at all"""

    def __post_init__(self) -> None:
        assert self.tokens.dtype == np.int32, self.tokens.dtype
        assert self.offsets.dtype == np.int64, self.offsets.dtype
        ends = self.offsets[0], self.offsets[-1]
        assert ends == (0, len(self.tokens)), (ends, len(self.tokens))
        assert len(self.offsets) > 1, "no documents"
        assert (np.diff(self.offsets) > 0).all(), "an empty document: eos is missing"
        assert len(self.names) in (0, len(self.offsets) - 1), len(self.names)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return int(self.tokens[-1])

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document, a view."""
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    def name_of(self, document: int) -> str:
        """Its name, or its number where names are not known."""
        return self.names[document] if self.names else f"document {document}"


class Selected:
    """Some of the documents of another collection."""

    def __init__(self, documents: TokenDocuments, places: np.ndarray) -> None:
        self._documents, self._places = documents, places
        self.lengths = np.asarray(documents.lengths)[places]
        self.eos_id = documents.eos_id

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document."""
        return self._documents.read(int(self._places[document]))

    def name_of(self, document: int) -> str:
        """What messages call it."""
        return self._documents.name_of(int(self._places[document]))


class Joined:
    """Several collections of the same tokenizer one after the other."""

    def __init__(self, parts: Sequence[TokenDocuments]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.eos_id = parts[0].eos_id
        assert all(part.eos_id == self.eos_id for part in parts)

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document."""
        part, place = self._find(document)
        return part.read(place)

    def name_of(self, document: int) -> str:
        """What messages call it."""
        part, place = self._find(document)
        return part.name_of(place)

    def _find(self, document: int) -> tuple[TokenDocuments, int]:
        part = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self._parts[part], document - int(self._starts[part])


def joined(parts: Sequence[TokenDocuments]) -> TokenDocuments:
    """`Joined`, or the only part as it is."""
    return parts[0] if len(parts) == 1 else Joined(parts)


def encode_documents(
    divided: Iterable[tuple[Document, bool]], tokenizer: Tokenizer, split_rate: float = 0.0
) -> Iterator[tuple[Document, bool, np.ndarray]]:
    """Each document with its ids between bos and eos (one separator if there is only eos), int32.

    Args:
        divided: documents, and whether each is held out; read chunk by chunk.
        split_rate: share of joined tokens that is split in documents that are not held out.

    ValueError if the tokenizer loses any byte of a document.
    """
    eos = np.array([tokenizer.eos_id], np.int32)
    bos = np.array([tokenizer.bos_id], np.int32)
    opening = () if tokenizer.bos_id == tokenizer.eos_id else (bos,)
    splitter = TokenSplitter(tokenizer, split_rate) if split_rate else None
    for chunk in _chunks(divided):
        encoded = tokenizer.encode_batch([document.text for document, _ in chunk])
        for (document, held_out), ids in zip(chunk, encoded, strict=True):
            if splitter is not None and not held_out:
                ids = splitter.split(document.text, ids)
            _check_lossless(document, ids, tokenizer)
            yield document, held_out, np.concatenate([*opening, ids, eos])


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, max_ids: int, split_rate: float = 0.0
) -> TokenizedCorpus:
    """All documents as ids, in memory.

    ValueError if the tokenizer has more than `max_ids` ids (the model's vocabulary), or loses any
    byte of a document.
    """
    check_fits(tokenizer, max_ids)
    if not documents:
        raise ValueError("data.source: 0 documents to tokenize; allowed: at least 1")
    divided = ((document, False) for document in documents)
    pieces = [ids for _, _, ids in encode_documents(divided, tokenizer, split_rate)]
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return TokenizedCorpus(np.concatenate(pieces), offsets, _names(documents))


def cached_tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    max_ids: int,
    cache_dir: str | Path | None = None,
    split_rate: float = 0.0,
) -> TokenizedCorpus:
    """`tokenize`, once: kept by content hash in `cache_dir` or the user's cache folder."""
    folder = cache_folder(cache_dir)
    if folder is None or tokenizer.vocab_size > max_ids:
        return tokenize(documents, tokenizer, max_ids, split_rate)
    version = f"format {_FORMAT_VERSION}" + (f", split {split_rate!r}" if split_rate else "")
    key = hash_texts((version, tokenizer.content_hash, content_hash(documents)))
    path = folder / "tokens" / f"{key}.npz"
    corpus = _read_corpus(path)
    if corpus is None:
        corpus = tokenize(documents, tokenizer, max_ids, split_rate)
        buffer = io.BytesIO()
        np.savez(buffer, tokens=corpus.tokens, offsets=corpus.offsets)
        store(path, buffer.getvalue())
    return replace(corpus, names=_names(documents))


def check_fits(tokenizer: Tokenizer, max_ids: int) -> None:
    """ValueError if the tokenizer has more than `max_ids` ids (the model's vocabulary)."""
    if tokenizer.vocab_size > max_ids:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids; "
            f"model.vocab_size is {max_ids}; allowed: at least as many as the tokenizer has"
        )


def _names(documents: Sequence[Document]) -> tuple[str, ...]:
    return tuple(document.name for document in documents)


def _chunks(divided: Iterable[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    chunk, characters = [], 0
    for document, held_out in divided:
        chunk.append((document, held_out))
        characters += len(document.text)
        if len(chunk) == _CHUNK or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


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
