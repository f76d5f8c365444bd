"""What a run of synthesis has been told so far: a line of JSON for each candidate, appended.

A line is written at once, so that a process that is killed loses none, and every few lines or
seconds reach the disk (fsync), so that a power loss costs little. A torn last line is cut off when
the run goes on: its candidate is asked for again, with the same seed.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config.plain_json import parse_json

LINES, SECONDS = 32, 5.0  # after which the disk has what was written


class Key(NamedTuple):
    """A candidate."""

    id: str
    kind: str
    number: int


class Journal:
    """An open file of candidates; for the one process that holds it."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. ValueError, one line, for a line that is none of ours."""
        self.entries: dict[Key, dict[str, Any]] = {}
        self.torn = False
        """Whether a torn last line was cut off"""
        self._path, self._pending, self._synced = path, 0, time.monotonic()
        self._file = path.open("ab+", buffering=0)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                self._take(parse_json(line))
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self._path} line {number} is no candidate; allowed: what this command wrote"
                ) from None
        if whole < len(content):
            self.torn = True
            self._file.truncate(whole)
            os.fsync(self._file.fileno())

    def _take(self, entry: dict[str, Any]) -> None:
        key = Key(entry["id"], entry["kind"], entry["candidate"])
        if key in self.entries:
            raise ValueError("twice")
        self.entries[key] = entry

    def add(self, entry: dict[str, Any]) -> None:
        """One more candidate. OSError, which names the file, if the disk has no room; nothing of
        it is then left.
        """
        begin = os.fstat(self._file.fileno()).st_size
        left = memoryview((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(begin)
            error.filename = str(self._path)
            raise
        self._take(entry)
        self._pending += 1
        if self._pending >= LINES or time.monotonic() - self._synced >= SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._pending, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """All of it is on the disk."""
        if self._pending:
            self._sync()
        self._file.close()
