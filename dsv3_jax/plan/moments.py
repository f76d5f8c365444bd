"""What a schedule comes to on each rank, known once for all runs that ask: how many operations of
each kind, and how many micro-batches wait there at its fullest moments (report 3.2.1, Table 2).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

from dsv3_jax.parallel.orders import Operation, Schedule, Work
from dsv3_jax.parallel.schedules import operations_of

Moment: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Micro-batches of each chunk between F and b, or B; and between b and W"""
Key: TypeAlias = tuple[str, int, int]  # name, ranks, micro-batches

LARGEST = 100_000  # ranks times micro-batches, which take about a minute to simulate

orders = lru_cache(32)(operations_of)


def check_size(ranks: int, microbatches: int) -> None:
    """ValueError for a schedule that would take too long to simulate."""
    if ranks * microbatches > LARGEST:
        raise ValueError(
            f"mesh.pipe {ranks:,} times train.microbatches {microbatches:,} is too large to "
            f"simulate; allowed: up to {LARGEST:,}"
        )


@lru_cache(256)
def counts(*key: str | int) -> list[Counter[Operation]]:
    """Of every rank, how many operations of each kind and chunk; micro-batch 0 stands for all."""
    schedule = orders(*key)
    return [Counter(map(_alike, schedule.operations(rank))) for rank in range(schedule.ranks)]


def _alike(operation: Operation) -> Operation:
    works = (operation.forward, operation.backward)
    return Operation(operation.kind, *(work and Work(0, work.chunk) for work in works))


@lru_cache(256)
def fullest_moments(keys: tuple[Key, ...]) -> list[list[Moment]]:
    """Of every rank, over steps with these schedules; chunks as in the first."""
    known = [_moments_of(*key) for key in keys]
    chunks = orders(*keys[0]).chunks
    padded = [[[_padded(m, chunks) for m in rank] for rank in schedule] for schedule in known]
    return [
        _undominated([m for rank in ranks for m in rank]) for ranks in zip(*padded, strict=True)
    ]


def _padded(moment: Moment, chunks: int) -> Moment:
    """1F1B, which a ramp's small steps fall back to, knows but the first chunk."""
    sets, left = (counts + (0,) * (chunks - len(counts)) for counts in moment)
    return sets, left


@lru_cache(1024)
def _moments_of(*key: str | int) -> list[list[Moment]]:
    schedule = orders(*key)
    return [moments_of(schedule, rank) for rank in range(schedule.ranks)]


def moments_of(schedule: Schedule, rank: int) -> list[Moment]:
    """Of one rank those that may be its fullest, whatever micro-batches take: no other moment has
    as many of each kind.

    Where a rank has b and W at all, its B is made of these two.
    """
    operations = schedule.operations(rank)
    split = {op.backward.chunk for op in operations if op.kind == "b"}
    sets, left = [0] * schedule.chunks, [0] * schedule.chunks
    found: dict[Moment, None] = {}
    for op in operations:
        for change in _changes(op, split):
            for waiting, chunk, step in change:
                (sets if waiting == "b" else left)[chunk] += step
            found[tuple(sets), tuple(left)] = None
    return _undominated(list(found))


def _undominated(moments: Sequence[Moment]) -> list[Moment]:
    kept: list[tuple[int, ...]] = []
    flat = {sets + left: (sets, left) for sets, left in moments}
    for one in sorted(flat, key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(more, one, strict=True)) for more in kept):
            kept.append(one)
    return [flat[one] for one in kept]


def _changes(op: Operation, split: set[int]) -> Iterator[list[tuple[str, int, int]]]:
    """What an operation does, moment by moment, to those that wait for their b or their W."""
    if op.forward:
        yield [("b", op.forward.chunk, 1)]
    if not op.backward:
        return
    chunk = op.backward.chunk
    if op.kind == "b" or (op.kind == "B" and chunk in split):
        yield [("b", chunk, -1), ("W", chunk, 1)]
    if op.kind == "W" or (op.kind == "B" and chunk in split):
        yield [("W", chunk, -1)]
    elif op.kind in ("B", "FB"):
        yield [("b", chunk, -1)]
