"""Folders of pre-tokenised documents: ArrayRecord shards that training reads one by one.

    manifest.json            what it is, sizes and checksums of all other files; written last
    tokenizer.json           the tokenizer
    index.npy                length, text hash and side of each document
    shard-00000.array_record one document a record: its name and its ids, bos and eos included

The division into training and held-out text, and split tokens, are part of the folder. A folder
without a manifest is unfinished and never read.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config.plain_json import parse_json
from dsv3_jax.data.documents import Document, text_hash
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.files import replace_file, sync

MANIFEST = "manifest.json"
FORMAT = "dsv3_jax tokens, version 1"
# Of ids in one shard: enough for streaming reads, few enough files for a corpus of terabytes.
SHARD_BYTES = 2**28

_TOKENIZER, _INDEX = "tokenizer.json", "index.npy"
_INDEX_DTYPE = np.dtype([("length", "<i8"), ("text_hash", "<u8"), ("held_out", "?")])
# Each record is its own chunk, with its own checksum, so one document is one read.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclass(frozen=True)
class FileSum:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder holds, and how it was made."""

    format: str
    dtype: str
    """Of the ids: '<u2' or '<u4'"""
    vocab_size: int
    documents: int
    tokens: int
    """bos and eos included"""
    bytes: int
    """Of the texts in UTF-8"""
    content_hash: str
    """Of the texts, as of documents in memory"""
    validation_fraction: float
    split_rate: float
    files: dict[str, FileSum]
    shards: dict[str, int]
    """Name of the file -> documents in it, in their order"""


class ShardWriter:
    """Writes a folder, document by document; nothing counts before `finish`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._tokenizer, self._shard_bytes = folder, tokenizer, shard_bytes
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._shards: dict[str, int] = {}
        self._writer, self._room = None, 0
        self._lengths, self._hashes, self._held_out = array("q"), array("Q"), array("B")

    def add(self, document: Document, held_out: bool, ids: np.ndarray) -> None:
        """One more document; `ids` with its bos and eos, int32 [N]."""
        name = document.name.encode("utf-8", "surrogateescape")
        record = len(name).to_bytes(4, "little") + name + ids.astype(self._dtype).tobytes()
        if self._room <= 0:
            self._next_shard()
        with self._system_errors():
            self._writer.write(record)
        self._room -= len(record)
        self._shards[self._shard] += 1
        self._lengths.append(len(ids))
        self._hashes.append(text_hash(document.text))
        self._held_out.append(held_out)

    def finish(self, **made: Any) -> Manifest:
        """Writes tokenizer, index and, when all is on disk, the manifest.

        Args:
            made: the manifest's bytes, content_hash, validation_fraction and split_rate.
        """
        self.close()
        self._tokenizer.save(self._folder / _TOKENIZER)
        index = np.empty(len(self._lengths), _INDEX_DTYPE)
        index["length"], index["text_hash"] = self._lengths, self._hashes
        index["held_out"] = self._held_out
        with open(self._folder / _INDEX, "wb") as file:
            np.save(file, index)
        for name in _files(self._shards):
            sync(self._folder / name)
        manifest = Manifest(
            format=FORMAT,
            dtype=self._dtype.str,
            vocab_size=self._tokenizer.vocab_size,
            documents=len(index),
            tokens=int(index["length"].sum()),
            files={name: _summed(self._folder / name) for name in _files(self._shards)},
            shards=self._shards,
            **made,
        )
        text = json.dumps(asdict(manifest), indent=2) + "\n"
        replace_file(self._folder / MANIFEST, text.encode())
        return manifest

    def close(self) -> None:
        """Ends the shard that is being written."""
        writer, self._writer, self._room = self._writer, None, 0
        if writer is not None:
            with self._system_errors():
                writer.close()

    def discard(self) -> None:
        """Removes what was written, and nothing else that may lie in the folder."""
        with contextlib.suppress(OSError):  # of a full disk, which the shard's end does not fit on
            self.close()
        for name in (*_files(self._shards), MANIFEST):
            (self._folder / name).unlink(missing_ok=True)

    def _next_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.close()
        self._shard = f"shard-{len(self._shards):05d}.array_record"
        self._shards[self._shard], self._room = 0, self._shard_bytes
        with self._system_errors():
            self._writer = ArrayRecordWriter(str(self._folder / self._shard), _WRITER_OPTIONS)

    @contextlib.contextmanager
    def _system_errors(self) -> Iterator[None]:
        """The library reports a full disk as RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(f"cannot write {self._folder / self._shard}: {error}") from None


class TokenFolder:
    """A finished folder, open for reading.

    ValueError, one line, if it is unfinished, of another format, or if its files are not those of
    the manifest. The shards' contents are checked record by record as they are read, in the middle
    of a run: OSError, as from a disk that fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        _check_files(path, self.manifest)
        self._index = np.load(path / _INDEX, mmap_mode="r")
        if self._index.dtype != _INDEX_DTYPE or len(self._index) != self.manifest.documents:
            raise _damaged_manifest(path)
        self.lengths = np.ascontiguousarray(self._index["length"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That all documents were written with."""
        return load_tokenizer(self.path / _TOKENIZER)

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return self.tokenizer.eos_id

    @property
    def held_out(self) -> np.ndarray:
        """Which documents are never trained on, bool [documents]."""
        return np.asarray(self._index["held_out"])

    def read(self, document: int) -> np.ndarray:
        """The tokens of one document, int32. OSError if its record is damaged."""
        _, ids = self._record(document)
        return ids

    def name_of(self, document: int) -> str:
        """What messages call it."""
        name, _ = self._record(document)
        return name

    def _record(self, document: int) -> tuple[str, np.ndarray]:
        try:
            record = self._records[document]
        except Exception as error:  # the library's errors have no common type
            raise self._damaged(document, " ".join(str(error).split())) from None
        start = 4 + int.from_bytes(record[:4], "little")
        dtype = np.dtype(self.manifest.dtype)
        length = int(self.lengths[document])
        if len(record) != start + length * dtype.itemsize:
            raise self._damaged(document, f"a record of {len(record)} bytes")
        name = record[4:start].decode("utf-8", "surrogateescape")
        return name, np.frombuffer(record, dtype, offset=start).astype(np.int32)

    @cached_property
    def _records(self) -> Any:
        """Record -> bytes. Readers are opened as they are needed, and shared by threads."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        shards = self.manifest.shards.items()
        return ArrayRecordDataSource([f"{self.path / name}[0:{count}]" for name, count in shards])

    def _damaged(self, document: int, found: str) -> OSError:
        ends = np.cumsum(list(self.manifest.shards.values()))
        shard = list(self.manifest.shards)[int(np.searchsorted(ends, document, side="right"))]
        return OSError(
            f"data.source: {self.path / shard} is damaged: document {document} of the folder "
            f"cannot be read ({found}); write the folder again"
        )


def is_token_folder(path: Path) -> bool:
    """Whether a folder was, or was to be, written by `ShardWriter`."""
    written = (MANIFEST, "shard-*.array_record")
    return path.is_dir() and any(True for pattern in written for _ in path.glob(pattern))


def _files(shards: Iterable[str]) -> list[str]:
    return [_TOKENIZER, _INDEX, *shards]


def _summed(path: Path) -> FileSum:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileSum(file.tell(), digest.hexdigest())


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        fields = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"data.source: {path} has no {MANIFEST}: python -m dsv3_jax.pretokenize did not finish "
            "there; write it again"
        ) from None
    except ValueError:
        raise _damaged_manifest(path) from None
    if not isinstance(fields, dict):
        raise _damaged_manifest(path)
    found = fields.get("format")
    if found != FORMAT:
        raise ValueError(f"data.source: {file} has format {found!r}; allowed: {FORMAT!r}")
    try:
        files = {name: FileSum(**sums) for name, sums in fields.pop("files").items()}
        manifest = Manifest(**fields, files=files)
    except (AttributeError, KeyError, TypeError):
        raise _damaged_manifest(path) from None
    if not _holds(manifest):
        raise _damaged_manifest(path)
    return manifest


def _damaged_manifest(path: Path) -> ValueError:
    return ValueError(f"data.source: {path / MANIFEST} is damaged; write the folder again")


def _holds(manifest: Manifest) -> bool:
    """Whether all numbers are numbers, and those of the shards add up."""
    counts = manifest.vocab_size, manifest.documents, manifest.tokens, manifest.bytes
    sizes = [file.bytes for file in manifest.files.values()]
    shards = manifest.shards.values() if isinstance(manifest.shards, dict) else [None]
    rates = manifest.validation_fraction, manifest.split_rate
    return (
        all(type(count) is int and count >= 0 for count in (*counts, *sizes, *shards))
        and all(type(rate) in (int, float) for rate in rates)
        and isinstance(manifest.content_hash, str)
        and manifest.dtype in ("<u2", "<u4")
        and sum(shards) == manifest.documents
    )


def _check_files(path: Path, manifest: Manifest) -> None:
    """All sizes; checksums of all but the shards, which may be terabytes."""
    for name in _files(manifest.shards):
        file, wanted = path / name, manifest.files.get(name)
        if wanted is None or not file.exists() or file.stat().st_size != wanted.bytes:
            raise ValueError(f"data.source: {file} is not as {MANIFEST} says; write it again")
        if name not in manifest.shards and _summed(file) != wanted:
            raise ValueError(f"data.source: {file} is damaged; write the folder again")
