"""Files that are never seen half-written, and that survive a power loss; where the cache lies."""

import contextlib
import ctypes
import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")  # as `replace_file` names it
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux


def cache_folder(override: str | Path | None = None) -> Path | None:
    """`override`, `$XDG_CACHE_HOME/dsv3_jax` or `~/.cache/dsv3_jax`; None without a home."""
    if override is not None:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "dsv3_jax" if os.path.isabs(base) else None


def replace_file(path: str | Path, data: bytes) -> None:
    """Writes a file so that any crash, of the machine too, leaves the old content or the new one.

    OSError, which names the file, where that is not possible; the old content then stays.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names none, and nobody knows the temporary name
        raise
    finally:
        part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether it is what a killed `replace_file` leaves."""
    return _PART.fullmatch(path.name) is not None


@contextlib.contextmanager
def whole_lines(path: str | Path) -> Iterator[Callable[[str], None]]:
    """Yields what writes a line, its end included, to a new file: whole lines are all that it ever
    holds, whenever the block ends. If that is before the first one, the file goes.

    ValueError for a file that holds something already; a device or a pipe is written to. OSError,
    which names the file, where that is not possible.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size:
        raise ValueError(f"{path} holds something already; allowed: a new or an empty file")
    with path.open("wb", buffering=0) as file:
        size, is_file = 0, path.is_file()

        def write(line: str) -> None:
            nonlocal size
            left = memoryview(line.encode())
            try:
                while left:
                    left = left[file.write(left) :]
                size += len(line.encode())
            except OSError as error:
                error.filename = str(path)
                raise

        try:
            yield write
        finally:
            if is_file:
                file.truncate(size)  # what a full disk, or ^C, has left of a line
                if not size:
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path, taken: Exception) -> Iterator[None]:
    """The folder is this process's until the end. `taken` is raised if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        yield
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Two paths swap names in one moment. False, and nothing done, where the system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    names = os.fsencode(one), os.fsencode(other)
    return swap is not None and swap(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """All that is below a folder, and its own entries."""
    for entry in folder.rglob("*"):
        sync(entry)
    sync(folder)
