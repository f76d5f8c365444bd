"""Documents of a source: the standard library or the user's text, JSONL and Parquet (report 4.1).

Files come in the order of their names, the documents of one file in its own order. They are read
one by one while somebody iterates, so a corpus larger than the memory can be gone through.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from dsv3_jax.data.documents import Document
from dsv3_jax.data.jsonl import read_jsonl
from dsv3_jax.data.parquet import read_parquet
from dsv3_jax.data.paths import user_path
from dsv3_jax.data.stdlib import stdlib_files
from dsv3_jax.data.text_files import BadUtf8, read_python, read_text

# Where a file lies, however it is spelt -> (path, name, what reads its documents)
_Files = dict[str, tuple[Path, str, Callable[[Path, str], Iterator[Document]]]]


def entries_of(source: str | tuple[str, ...]) -> tuple[str, ...]:
    """A source as its entries."""
    return (source,) if isinstance(source, str) else source


def iterate_documents(
    source: str | tuple[str, ...], field: str = "text", bad_utf8: BadUtf8 = "reject"
) -> Iterator[Document]:
    """The documents of `source`, read one by one; empty ones are left out, each file comes once.

    Args:
        source: `"stdlib"`, a glob of files (`**` crosses folders), or several of these. What is not
            .jsonl, .jsonl.gz or .parquet is one text.
        field: of a JSONL line or a Parquet row: where the text is.
        bad_utf8: bytes that are no UTF-8 are an error ("reject") or become U+FFFD ("replace").

    ValueError if a glob matches no file, if a file cannot be read or is not what its name says, or
    if there is no text at all.
    """
    entries = entries_of(source)
    files: _Files = {}
    for entry in entries:
        files |= _files_of(entry, field, bad_utf8)
    is_empty = True
    for path, name, read in sorted(files.values(), key=lambda file: file[1]):
        for document in read(path, name):
            if document.text:
                is_empty = False
                yield document
    if is_empty:
        names = ", ".join(map(repr, entries)) or "()"
        raise ValueError(f"data.source {names}: no text in {len(files)} files")


def load_documents(
    source: str | tuple[str, ...], field: str = "text", bad_utf8: BadUtf8 = "reject"
) -> list[Document]:
    """All of `iterate_documents` in memory."""
    return list(iterate_documents(source, field, bad_utf8))


def _files_of(entry: str, field: str, bad_utf8: BadUtf8) -> _Files:
    if entry == "stdlib":
        read = partial(read_python, bad_utf8=bad_utf8)
        found = stdlib_files().items()
        return {os.path.realpath(path): (path, name, read) for path, name in found}
    return {
        place: (path, path.as_posix(), _reader(path, field, bad_utf8))
        for place, path in each_once(matching(entry)).items()
    }


def _reader(path: Path, field: str, bad_utf8: BadUtf8) -> Callable[[Path, str], Iterator[Document]]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return partial(read_jsonl, field=field, bad_utf8=bad_utf8)
    if name.endswith(".parquet"):
        return partial(read_parquet, field=field, bad_utf8=bad_utf8)
    return partial(read_text, bad_utf8=bad_utf8)


def each_once(paths: Iterable[Path]) -> dict[str, Path]:
    """Where files lie -> the first of their paths, in whatever order a folder lists them."""
    return {os.path.realpath(path): path for path in sorted(paths, reverse=True)}


def matching(pattern: str) -> list[Path]:
    """The files of a glob. Folders that a wildcard meets are passed over; ValueError for none."""
    literal = user_path(pattern, "data.source")
    if literal.is_dir():
        raise ValueError(
            f"data.source: {literal} is a folder; allowed: files, as in '{literal}/**/*.txt', or "
            "a folder that python -m dsv3_jax.pretokenize has written"
        )
    if os.path.lexists(literal):
        return [literal]
    paths = [Path(match) for match in glob.glob(str(literal), recursive=True)]
    paths = [path for path in paths if not path.is_dir()]
    if not paths:
        raise ValueError(f"data.source {pattern!r}: no file matches")
    return paths
