"""API keys: from a file or the environment, compared in constant time, kept as hashes alone."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "DSV3_API_KEYS"


class Keys:
    """Those that open the server; none leave it open."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def open(self, authorization: bytes) -> bool:
        """Whether a header's value bears one of them. Every key is looked at, whichever it is."""
        scheme, _, key = authorization.partition(b" ")
        found = _hash(key.strip())
        opens = [hmac.compare_digest(found, known) for known in self._hashes]
        return scheme.lower() == b"bearer" and any(opens)


def read_keys(file: Path | None) -> Keys:
    """Of a file one a line, blank lines and # comments aside; else of the environment, at commas.

    ValueError, one line, for a file without keys and for one that cannot be a header's value. It
    never has a key in it.
    """
    if file is None:
        lines, where = os.environ.get(VARIABLE, "").split(","), VARIABLE
    else:
        lines, where = _lines_of(file), str(file)
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not (file and key.startswith("#"))]
    if not keys and (file is not None or where in os.environ):
        raise ValueError(f"{where} holds no key; allowed: one or more")
    for number, key in enumerate(keys, start=1):
        if not all("!" <= char <= "~" for char in key):
            raise ValueError(f"{where}: key {number} has characters beyond ASCII, or spaces")
    return Keys(keys)


def _lines_of(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8") from None


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
