"""When each operation of a schedule runs, given how long its kind takes (report 3.2.1, Table 2).

Two models of transfers. By default a message crosses in no time and only who needs it waits, as the
table assumes. With a time for transfers both neighbours stop for a swap, as devices do that run one
program after the other. Either way the orders are first checked: every input is there before its
use, and blocking transfers never wait for each other in a circle.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dsv3_jax.parallel.order_check import check_orders
from dsv3_jax.parallel.orders import Item, Operation, Place, Schedule, Transfer

Times: TypeAlias = Mapping[str | tuple[int, str], float]  # by kind or by (rank, kind)


@dataclass(frozen=True)
class Span:
    """One operation on one rank, in the unit of the given times."""

    rank: int
    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step. Times count from its begin."""

    schedule: Schedule
    spans: tuple[Span, ...]
    """Rank by rank, each in order"""
    peak: tuple[int, ...]
    """Of each rank, the most residual sets alive at once. A set, what the forward pass of one chunk
    keeps of one micro-batch, is born with F and dies after B or W."""

    @property
    def makespan(self) -> float:
        """End of the last operation."""
        return max(span.end for span in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Of each rank, the time in operations."""
        total = [0.0] * self.schedule.ranks
        for span in self.spans:
            total[span.rank] += span.end - span.start
        return tuple(total)

    @property
    def idle(self) -> tuple[float, ...]:
        """Of each rank, the rest of the makespan."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Idle time of the rank that idles most."""
        return max(self.idle)

    @property
    def idle_share(self) -> float:
        """Of the time of all ranks, between 0 and 1."""
        return sum(self.idle) / (self.schedule.ranks * self.makespan)


def simulate(
    schedule: Schedule,
    F: float = 1,
    B: float = 2,
    W: float = 1,
    FB: float = 3,
    *,
    measured: Times | None = None,
    transfer: float | None = None,
) -> Timeline:
    """The step with operations that last F, B, W, FB, and b B − W (report 3.2.1, Table 2).

    `measured` times, by kind or (rank, kind) and with b's own or without, go before these. With
    `transfer`, both ranks of a swap stop until both are there and for so long. ValueError for
    orders that cannot run, with the rank and the operation, and for times that are none.
    """
    times = {"F": F, "B": B, "W": W, "FB": FB} | dict(measured or {})
    times.setdefault("b", times["B"] - times["W"])
    check_orders(schedule)
    _check_times(schedule, times)
    if transfer is not None and not 0 <= transfer < math.inf:
        raise ValueError(f"time of a transfer is {transfer:g}; allowed: 0 or more, finite")

    def lasts(rank: int, operation: Operation) -> float:
        return times.get((rank, operation.kind), times[operation.kind])

    timeline = timeline_of(schedule, lasts, transfer)
    if not timeline.makespan < math.inf:
        raise ValueError("times add up to more than a float holds; allowed: smaller ones")
    return timeline


def timeline_of(
    schedule: Schedule,
    lasts: Callable[[int, Operation], float],
    transfer: float | None = None,
) -> Timeline:
    """The step with any times, of a rank and an operation. The orders must be able to run."""
    spans = spans_of(schedule, lasts, transfer)
    peak = tuple(_peak(schedule.operations(rank)) for rank in range(schedule.ranks))
    return Timeline(schedule, tuple(spans), peak)


def _check_times(schedule: Schedule, times: Times) -> None:
    """ValueError for a time that the schedule needs and that is not above 0 and finite."""
    kinds = {op.kind for rank in range(schedule.ranks) for op in schedule.operations(rank)}
    for key, time in times.items():
        kind, where = (key, "") if isinstance(key, str) else (key[1], f" on rank {key[0]}")
        if kind in kinds and not 0 < time < math.inf:
            name = "b (B - W)" if key == "b" else kind
            raise ValueError(
                f"{schedule.name}: time of {name}{where} is {time:g}; allowed: above 0, finite"
            )


def spans_of(
    schedule: Schedule,
    lasts: Callable[[int, Operation], float],
    transfer: float | None = None,
) -> list[Span]:
    """Each operation as early as its rank and its inputs allow. The orders must be able to run."""
    clock = _Clock(schedule, lasts, transfer)
    while sum(clock.advance(rank) for rank in range(schedule.ranks)):
        pass
    assert all(len(s) == len(schedule.operations(r)) for r, s in enumerate(clock.spans))
    return [span for spans in clock.spans for span in spans]


class _Clock:
    """How far each rank has come, and when."""

    def __init__(
        self,
        schedule: Schedule,
        lasts: Callable[[int, Operation], float],
        transfer: float | None,
    ) -> None:
        self.schedule, self.lasts, self.transfer = schedule, lasts, transfer
        self.at = [0] * schedule.ranks  # place in the order
        self.now = [0.0] * schedule.ranks
        self.spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
        self.done: dict[tuple[str, int, Place], float] = {}

    def advance(self, rank: int) -> int:
        """Runs what can run on a rank; how many items that were."""
        begin, order = self.at[rank], self.schedule.orders[rank]
        while self.at[rank] < len(order) and self._step(rank, order[self.at[rank]]):
            pass
        return self.at[rank] - begin

    def _step(self, rank: int, item: Item) -> bool:
        if isinstance(item, Transfer):
            return self._swap(rank, item)
        inputs = [self.done.get(key) for key in _inputs(self.schedule, rank, item)]
        if None in inputs:
            return False
        start = max([self.now[rank], *inputs])
        end = self.now[rank] = start + self.lasts(rank, item)
        self.spans[rank].append(Span(rank, item, start, end))
        if item.forward:
            self.done["F", item.forward.microbatch, (rank, item.forward.chunk)] = end
        if item.gives_gradient:
            self.done["B", item.backward.microbatch, (rank, item.backward.chunk)] = end
        self.at[rank] += 1
        return True

    def _swap(self, rank: int, item: Transfer) -> bool:
        """Alone if nobody waits for a swap, else together with the partner."""
        if self.transfer is None:
            self.at[rank] += 1
            return True
        partner = item.partner_of(rank)
        order, at = self.schedule.orders[partner], self.at[partner]
        if at == len(order) or order[at] != item:
            return False
        self.now[rank] = self.now[partner] = max(self.now[rank], self.now[partner]) + self.transfer
        self.at[rank] += 1
        self.at[partner] += 1
        return True


def _inputs(schedule: Schedule, rank: int, operation: Operation) -> list[tuple[str, int, Place]]:
    """What other ranks, or the turn of a V, must have computed before."""
    inputs = []
    if work := operation.forward:
        inputs.append(("F", work.microbatch, schedule.before(rank, work)))
    if operation.gives_gradient:
        work = operation.backward
        inputs.append(("B", work.microbatch, schedule.after(rank, work)))
    return [key for key in inputs if key[2] is not None]


def _peak(operations: tuple[Operation, ...]) -> int:
    live = peak = 0
    for operation in operations:
        live += operation.forward is not None
        peak = max(peak, live)
        live -= operation.frees
    return peak
