"""The time a run spends: steps per second, and the share of it that waits for data."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class _Mark(NamedTuple):
    """After some step: rows consumed, seconds of training, seconds waited for data until then."""

    rows: int
    seconds: float
    waited: float


class Clock:
    """Of training alone: validations and checkpoints are left out, times before a resume are in."""

    WINDOW = 20  # steps that a rate is taken over

    def __init__(self, rows: int, seconds: float) -> None:
        self._idle, self._begin = 0.0, time.perf_counter() - seconds
        self._waited, self._paused_at = 0.0, None
        self._marks = [_Mark(rows, seconds, 0.0)]

    def seconds(self) -> float:
        now = self._paused_at or time.perf_counter()
        return now - self._begin - self._idle

    def mark(self, rows: int) -> None:
        """A step has ended, after `rows` rows of the run."""
        mark = _Mark(rows, self.seconds(), self._waited)
        self._marks = [*self._marks[-self.WINDOW :], mark]

    def rows_per_second(self) -> float:
        first, last = self._marks[0], self._marks[-1]
        return (last.rows - first.rows) / max(last.seconds - first.seconds, 1e-9)

    def data_wait(self) -> float:
        """Share of the time, 0 to 1."""
        first, last = self._marks[0], self._marks[-1]
        return (last.waited - first.waited) / max(last.seconds - first.seconds, 1e-9)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is spent on waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        self._paused_at = time.perf_counter()
        yield
        self._idle += time.perf_counter() - self._paused_at
        self._paused_at = None
