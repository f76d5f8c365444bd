"""Files of plain text, and bytes as text (report 4.1)."""

import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dsv3_jax.config.plain_json import check_plain
from dsv3_jax.data.documents import Document

BadUtf8 = Literal["reject", "replace"]
"""Bytes that are no UTF-8: an error, or U+FFFD"""


def read_text(path: Path, name: str, bad_utf8: BadUtf8) -> Iterator[Document]:
    """The file as one document. ValueError if it cannot be read or, with "reject", decoded."""
    yield Document(name, decode(str(path), _read_bytes(path), bad_utf8))


def read_python(path: Path, name: str, bad_utf8: BadUtf8) -> Iterator[Document]:
    """A source file as one document, in the encoding it declares (PEP 263); ValueError likewise."""
    data = _read_bytes(path)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    except SyntaxError as error:
        raise ValueError(f"data.source: {path}: {error.msg}") from None
    yield Document(name, decode(str(path), data, bad_utf8, encoding=encoding))


def decode(
    where: str, data: bytes, bad_utf8: BadUtf8, offset: int = 0, encoding: str = "utf-8"
) -> str:
    """The text, line ends untouched. `offset` is where in the file `data` starts.

    ValueError that names place, byte and offset, unless bad bytes are to be replaced.
    """
    try:
        return data.decode(encoding, "strict" if bad_utf8 == "reject" else "replace")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.source: {where} is not {encoding} text: byte 0x{data[error.start]:02x} at "
            f"offset {offset + error.start} ({error.reason}); "
            "allowed: valid text, or data.bad_utf8 'replace'"
        ) from None


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in a few words on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def _read_bytes(path: Path) -> bytes:
    try:
        check_plain(path)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data.source: cannot read {path}: {reason_of(error)}") from None
