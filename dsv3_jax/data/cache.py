"""Work kept between runs by the hash of its input (no section of the report).

A cache that cannot be read or written costs time and nothing else.
"""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from dsv3_jax.files import replace_file

_log = logging.getLogger(__name__)


class TextsHash:
    """SHA-256 of a sequence of texts, taken one by one; ("ab", "c") and ("a", "bc") differ."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, data: bytes) -> None:
        """One more text, in UTF-8."""
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)

    def hexdigest(self) -> str:
        """Of all texts so far."""
        return self._digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """`TextsHash` of some texts, in hexadecimal."""
    digest = TextsHash()
    for text in texts:
        digest.add(text.encode())
    return digest.hexdigest()


def store(path: Path, data: bytes) -> None:
    """Keep `data` in the cache if the cache can be written; log one line if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        _log.warning("not cached, the work is done again next time: %s", error)
