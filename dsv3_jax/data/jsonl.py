"""JSON Lines: one JSON object a line, one of its fields is the text (report 4.1)."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsv3_jax.config.plain_json import check_plain
from dsv3_jax.data.documents import Document
from dsv3_jax.data.text_files import BadUtf8, decode, reason_of


def read_jsonl(path: Path, name: str, field: str, bad_utf8: BadUtf8) -> Iterator[Document]:
    """A document for each line that is not blank, named `file.jsonl:17`; `.gz` files too.

    ValueError with file and line for a line that is no JSON object with a text in that field, for
    bad UTF-8 (unless replaced) also with the offset in the file; and for a file that cannot be
    read.
    """
    for number, record in json_lines(path, bad_utf8):
        yield Document(f"{name}:{number}", _text(f"{path} line {number}", record, field, bad_utf8))


def json_lines(
    path: Path, bad_utf8: BadUtf8, parse: Callable[[str], Any] = json.loads
) -> Iterator[tuple[int, Any]]:
    """The number, from 1, and the content of each line that is not blank; errors are those of
    `read_jsonl` for what is no JSON, bad UTF-8 and files that cannot be read.
    """
    offset = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    start, where = offset + len(line) - len(content), f"{path} line {number}"
                    source = decode(where, content.rstrip(b"\r\n"), bad_utf8, start)
                    yield number, _parsed(where, source, parse)
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data.source: cannot read {path}: {reason_of(error)}") from None


def _open(path: Path) -> BinaryIO:
    check_plain(path)
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _parsed(where: str, source: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(source)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data.source: {where} is no JSON: {error.msg} at column {error.colno}"
        ) from None
    except (RecursionError, ValueError) as error:  # brackets too deep, numbers too long
        reason = reason_of(error)
        raise ValueError(f"data.source: {where} is no JSON that can be read: {reason}") from None


def _text(where: str, record: Any, field: str, bad_utf8: BadUtf8) -> str:
    return whole_text(f"{where}, field {field!r}", _field(where, record, field), bad_utf8)


def whole_text(where: str, text: str, bad_utf8: BadUtf8) -> str:
    """A text out of JSON, which can spell halves of surrogate pairs, which no UTF-8 has: \\ud800
    alone.
    """
    if text.isascii():
        return text
    return decode(where, text.encode("utf-8", "surrogatepass"), bad_utf8)


def _field(where: str, record: Any, field: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(
            f"data.source: {where} is a JSON {type(record).__name__}; "
            f"allowed: an object with the field {field!r}"
        )
    if field not in record:
        found = ", ".join(sorted(map(repr, record))) or "none"
        raise ValueError(
            f"data.source: {where} has no field {field!r}; fields found: {found}; "
            "allowed as data.text_field: a field of every line"
        )
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(
            f"data.source: {where}: field {field!r} is of type {type(text).__name__}; allowed: text"
        )
    return text
