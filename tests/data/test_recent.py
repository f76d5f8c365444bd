"""What was read last is not read again; what is kept is bounded."""

import threading

import numpy as np

from dsv3_jax.data.recent import RecentDocuments


def reads_of(recent: RecentDocuments, *sizes: int) -> list[int]:
    """Which of the documents, each known by its size in bytes, had to be read."""
    read = []
    for size in sizes:
        found = recent.get(size, lambda size=size: read.append(size) or np.zeros(size, np.uint8))
        assert found.nbytes == size
    return read


def test_the_least_recent_goes_first() -> None:
    recent = RecentDocuments(10)
    assert reads_of(recent, 4, 5, 4, 5, 4) == [4, 5]
    assert reads_of(recent, 3, 4, 3) == [3]  # 5 went
    assert reads_of(recent, 5, 3) == [5]  # 4 went
    assert reads_of(recent, 4) == [4]


def test_one_that_is_beyond_the_bound_is_kept_alone() -> None:
    recent = RecentDocuments(10)
    assert reads_of(recent, 4, 50, 50, 4, 50) == [4, 50, 4, 50]


def test_one_that_two_threads_read_at_once_counts_once() -> None:
    recent, both = RecentDocuments(10), threading.Barrier(2)

    def read() -> np.ndarray:
        both.wait()
        return np.zeros(6, np.uint8)

    threads = [threading.Thread(target=recent.get, args=(6, read)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads_of(recent, 4, 6, 4) == [4]
