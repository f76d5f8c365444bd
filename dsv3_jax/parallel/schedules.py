"""Pipeline schedules as data: GPipe, 1F1B, ZB1P, DualPipe, DualPipeV (report 3.2.1, Table 2).

`make` gives what each rank does, in order; `simulate` when, and what it costs in idle time and
memory. Nothing here needs a device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dsv3_jax.parallel.dualpipe import dualpipe_orders, dualpipev_orders
from dsv3_jax.parallel.orders import Message, Operation, Schedule, Transfer, Work
from dsv3_jax.parallel.simulator import Span, Timeline, simulate
from dsv3_jax.parallel.transfers import with_transfers

__all__ = [
    "NAMES",
    "Message",
    "Operation",
    "Schedule",
    "Span",
    "Timeline",
    "Transfer",
    "Work",
    "check",
    "fits",
    "make",
    "operations_of",
    "simulate",
]


def gpipe_orders(ranks: int, microbatches: int) -> list[list[Operation]]:
    """All forward passes, then all backward passes."""
    every = range(microbatches)
    return [[*map(_forward, every), *map(_full, every)] for _ in range(ranks)]


def one_f_one_b_orders(ranks: int, microbatches: int) -> list[list[Operation]]:
    """As many forward passes as there are ranks from here to the end, then one backward for one
    forward.
    """
    return [_alternating(microbatches, ranks - rank, lambda i: [_full(i)]) for rank in range(ranks)]


def zb1p_orders(ranks: int, microbatches: int) -> list[list[Operation]]:
    """1F1B with B in its halves, W r micro-batches behind b on rank r: together with the P - r that
    wait for their b, that makes P live sets on every rank.
    """
    orders = []
    for rank in range(ranks):

        def backward(i: int, behind: int = rank) -> list[Operation]:
            late = [_weights(i - behind)] if i >= behind else []
            return [Operation("b", backward=Work(i, 0)), *late]

        tail = map(_weights, range(max(0, microbatches - rank), microbatches))
        orders.append([*_alternating(microbatches, ranks - rank, backward), *tail])
    return orders


def _alternating(
    microbatches: int, ahead: int, backward: Callable[[int], list[Operation]]
) -> list[Operation]:
    """Forward passes run `ahead` of the backward passes."""
    order = [_forward(i) for i in range(min(ahead, microbatches))]
    for i in range(microbatches):
        order += backward(i)
        order += [_forward(i + ahead)] * (i + ahead < microbatches)
    return order


def _forward(microbatch: int) -> Operation:
    return Operation("F", forward=Work(microbatch, 0))


def _full(microbatch: int) -> Operation:
    return Operation("B", backward=Work(microbatch, 0))


def _weights(microbatch: int) -> Operation:
    return Operation("W", backward=Work(microbatch, 0))


@dataclass(frozen=True)
class _Kind:
    """How a schedule's orders are built and what it needs."""

    orders: Callable[[int, int], list[list[Operation]]]
    even: bool = False
    """Ranks and micro-batches"""
    microbatches_per_rank: int = 0
    """At least"""


_KINDS = {
    "gpipe": _Kind(gpipe_orders),
    "1f1b": _Kind(one_f_one_b_orders),
    "zb1p": _Kind(zb1p_orders),
    "dualpipe": _Kind(dualpipe_orders, even=True, microbatches_per_rank=2),
    "dualpipev": _Kind(dualpipev_orders, microbatches_per_rank=2),
}
NAMES = tuple(_KINDS)


def check(name: str, ranks: int, microbatches: int) -> None:
    """ValueError, with what is allowed, if there is no such schedule."""
    if name not in _KINDS:
        raise ValueError(f"schedule is {name!r}; allowed: {', '.join(NAMES)}")
    kind = _KINDS[name]
    least, even = 1 + kind.even, "even, " * kind.even
    if ranks < least or (kind.even and ranks % 2):
        raise ValueError(f"{name}: ranks are {ranks:,}; allowed: {even}{least} or more")
    least = max(1, kind.microbatches_per_rank * ranks)
    if microbatches < least or (kind.even and microbatches % 2):
        raise ValueError(
            f"{name} on {ranks:,} rank{'s' * (ranks > 1)}: micro-batches are {microbatches:,}; "
            f"allowed: "
            f"{even}{least:,} or more"
        )


def fits(name: str, ranks: int, microbatches: int) -> bool:
    """Whether there is such a schedule; ValueError for an unknown name."""
    if name not in _KINDS:
        check(name, ranks, microbatches)
    try:
        check(name, ranks, microbatches)
    except ValueError:
        return False
    return True


def make(name: str, ranks: int, microbatches: int) -> Schedule:
    """The schedule of one step: gpipe, 1f1b, zb1p, dualpipe or dualpipev (report 3.2.1).

    ValueError, as `check` says, for what there is not.
    """
    schedule = operations_of(name, ranks, microbatches)
    return replace(schedule, orders=with_transfers(schedule))


def operations_of(name: str, ranks: int, microbatches: int) -> Schedule:
    """The same without transfers, for whom messages cross in no time: made several times faster."""
    check(name, ranks, microbatches)
    orders = _KINDS[name].orders(ranks, microbatches)
    return Schedule(name, ranks, microbatches, tuple(map(tuple, orders)))
