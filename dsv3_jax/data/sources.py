"""Documents to train on: the standard library's source code, or the user's texts (report 4.1).

The default corpus is real text that every interpreter brings along, about 10 MB of Python. The
split into training and validation goes by a hash of each document's text: adding files never moves
old ones, and copies of one file stay on one side.
"""

import glob
import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.data.cache import hash_texts

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__")
)
# Written when an interpreter is built: full of that machine's paths, and no two builds agree.
_BUILD_OUTPUT = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One text with the name that messages call it by."""

    name: str
    text: str


def load_documents(source: str | tuple[str, ...]) -> list[Document]:
    """The documents of `source`, sorted by name; empty files are left out.

    Args:
        source: `"stdlib"`, a glob of UTF-8 text files (`**` crosses folders), or several of these.

    ValueError if a glob matches no file, if a file cannot be read or is not UTF-8, or if there is
    no text at all.
    """
    entries = (source,) if isinstance(source, str) else source
    found = {}
    for entry in entries:
        found |= _stdlib_documents() if entry == "stdlib" else _matching_documents(entry)
    documents = [document for document in found.values() if document.text]
    if not documents:
        names = ", ".join(map(repr, entries)) or "()"
        raise ValueError(f"data.source {names}: no text in {len(found)} files")
    return sorted(documents, key=lambda document: document.name)


def split_documents(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """(training, validation), each in the order of `documents`, neither empty.

    A document is for validation if the hash of its text, read as a number in [0, 1), is below the
    fraction. Where that leaves a side empty (few documents), the longest document is cut at a line,
    so that each side gets its share of the text as nearly as one cut can give it.

    ValueError for a fraction outside (0, 1), or if there is nothing to divide.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction is {validation_fraction}; allowed: more than 0, less than 1"
        )
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        held_out = _unit_hash(document.text) < validation_fraction
        (validation if held_out else train).append(document)
    if not validation:
        return _cut_longest(documents, 1 - validation_fraction, from_start=False)
    if not train:
        return _cut_longest(documents, 1 - validation_fraction, from_start=True)
    return train, validation


def content_hash(documents: Sequence[Document]) -> str:
    """SHA-256 of the texts in their order, in hexadecimal. Names do not count."""
    return hash_texts(document.text for document in documents)


def _stdlib_documents() -> dict[str, Document]:
    """Path -> document, named relative to the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(_is_library, subfolders)
        for name in filter(_is_library, names):
            path = Path(folder, name)
            if path.suffix == ".py":
                name_in_library = path.relative_to(root).as_posix()
                found[str(path)] = Document(name_in_library, _read_python(path))
    if not found:
        raise ValueError(f"data.source 'stdlib': no Python source in {root}")
    return found


def _is_library(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_OUTPUT)


def _matching_documents(pattern: str) -> dict[str, Document]:
    """Path -> document. Folders that a wildcard meets are passed over."""
    literal = Path(pattern).expanduser()
    if os.path.lexists(literal):
        return {str(literal): Document(literal.as_posix(), _read_text(literal))}
    matches = map(Path, glob.glob(str(literal), recursive=True))
    paths = [path for path in matches if not path.is_dir()]
    if not paths:
        raise ValueError(f"data.source {pattern!r}: no file matches")
    return {str(path): Document(path.as_posix(), _read_text(path)) for path in paths}


def _read_text(path: Path) -> str:
    return _decode(path, _read_bytes(path), "utf-8")


def _read_python(path: Path) -> str:
    """The text of a source file in the encoding it declares (PEP 263)."""
    data = _read_bytes(path)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    except SyntaxError as error:
        raise ValueError(f"data.source: {path}: {error.msg}") from None
    return _decode(path, data, encoding)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise ValueError(
            f"data.source: {path} is a folder; allowed: files, as in '{path}/**/*.txt'"
        ) from None
    except OSError as error:
        raise ValueError(f"data.source: cannot read {path}: {error.strerror}") from None


def _decode(path: Path, data: bytes, encoding: str) -> str:
    """The text, line ends untouched."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.source: {path} is not {encoding} text: "
            f"byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason})"
        ) from None


def _unit_hash(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    # 53 bits: what a float holds exactly, so that rounding never reaches 1.0.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _cut_longest(
    documents: Sequence[Document], train_share: float, from_start: bool
) -> tuple[list[Document], list[Document]]:
    """The longest document in two; the others follow its tail if `from_start`, else its head."""
    lengths = [len(document.text) for document in documents]
    if max(lengths, default=0) < 2:
        raise ValueError(
            f"data.source: {sum(lengths)} characters in {len(documents)} documents; "
            "allowed: enough text to divide into training and validation"
        )
    place = lengths.index(max(lengths))
    whole = documents[place]
    others_first = 0 if from_start else sum(lengths) - lengths[place]
    cut = _cut_point(whole.text, round(train_share * sum(lengths)) - others_first)
    head = Document(f"{whole.name}[:{cut}]", whole.text[:cut])
    tail = Document(f"{whole.name}[{cut}:]", whole.text[cut:])
    before, after = documents[:place], documents[place + 1 :]
    if from_start:
        return [head], [*before, tail, *after]
    return [*before, head, *after], [tail]


def _cut_point(text: str, wanted: int) -> int:
    """Where a line starts nearest to `wanted`, never at an end of the text.

    `wanted` itself, within the text, where lines are so long that none starts within half of it.
    """
    wanted = min(max(wanted, 1), len(text) - 1)
    before = text.rfind("\n", 0, wanted) + 1
    after = text.find("\n", wanted - 1) + 1
    near = [
        start
        for start in (before, after)
        if 0 < start < len(text) and abs(start - wanted) <= len(text) / 2
    ]
    return min(near, key=lambda start: abs(start - wanted), default=wanted)
