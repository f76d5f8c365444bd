"""A document, one text with a name, and the hashes that identify texts (report 4.1)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from dsv3_jax.data.cache import hash_texts


@dataclass(frozen=True)
class Document:
    """One text with the name that messages call it by."""

    name: str
    text: str


def content_hash(documents: Iterable[Document]) -> str:
    """SHA-256 of the texts in their order, in hexadecimal. Names do not count."""
    return hash_texts(document.text for document in documents)


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256: what is decided for a document goes by its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
