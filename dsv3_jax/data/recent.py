"""Long documents that were read last: many rows are cut out of each, and all would read it."""

import threading
from collections.abc import Callable, Hashable

import numpy as np


class RecentDocuments:
    """Arrays by key, the most recent ones that fit into `max_bytes` together, one at the least.
    Threads may share it: readers that miss the same one at the same time each read it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._arrays: dict[Hashable, np.ndarray] = {}
        self._changing = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a key; whoever takes it must not write to it."""
        with self._changing:
            found = self._arrays.pop(key, None)
            if found is not None:
                self._arrays[key] = found  # the last in the order, the last to go
                return found
        array = read()
        with self._changing:
            if key not in self._arrays:
                self._arrays[key] = array
                self._bytes += array.nbytes
            while self._bytes > self._max_bytes and len(self._arrays) > 1:
                self._bytes -= self._arrays.pop(next(iter(self._arrays))).nbytes
        return array
