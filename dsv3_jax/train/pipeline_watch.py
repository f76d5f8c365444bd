"""A step of a pipeline as it goes: where it is when it hangs, and how long its operations take.

The executor hands operations over far ahead of the devices. Which of them has not ended says where
a step hangs; only references that keep nothing alive are held. To be measured, each operation of
one step is waited for, so that it has the machine to itself: that step is as slow as if nothing
overlapped.
"""

import statistics
import time
import weakref
from collections import defaultdict
from typing import Any

import jax

from dsv3_jax.parallel.orders import Item, Operation, Schedule, Transfer

MEASURED_STEP = 2  # of a process: the first one still compiles what is around passes


class PipelineWatch:
    """Of one step; `parallel.pipeline.Watch`."""

    def __init__(self, schedule: Schedule, *, measure: bool) -> None:
        self.schedule = schedule
        self._measure, self._since = measure, time.perf_counter()
        self._seconds: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
        self._handed: list[tuple[int, Item, weakref.ref]] = []

    def __call__(self, rank: int, item: Item, result: Any) -> None:
        arrays = jax.tree.leaves(result)
        if self._measure:
            jax.block_until_ready(arrays)
            now = time.perf_counter()
            if isinstance(item, Operation):
                self._seconds[rank, item.kind].append(now - self._since)
            self._since = now
        if arrays:
            self._handed.append((rank, item, weakref.ref(arrays[0])))

    def where(self) -> str:
        """The first operation or transfer that has not ended; from any thread."""
        for rank, item, reference in list(self._handed):
            array = reference()
            if array is None or array.is_deleted() or array.is_ready():
                continue
            if isinstance(item, Transfer):
                return f"transfer between ranks {item.left} and {item.left + 1}: {item}"
            work = item.forward or item.backward
            stage = self.schedule.stage(rank, work.chunk)
            return f"rank {rank}, stage {stage}, micro-batch {work.microbatch}: {item.kind}"
        return "around the passes: gradients, update, or handing over"

    def seconds(self) -> dict[str, list[float | None]]:
        """Medians by kind, of every rank; None for ranks of other processes, or without such an
        operation.
        """
        kinds = sorted({kind for _, kind in self._seconds})
        return {
            kind: [
                statistics.median(self._seconds[rank, kind]) if self._seconds[rank, kind] else None
                for rank in range(self.schedule.ranks)
            ]
            for kind in kinds
        }
