"""Where transfers stand in a schedule's orders, so that they can block and never deadlock.

Each message has a moment: the end of the operation that makes it, when operations last F = 1,
B = 2, W = 1, FB = 2 and messages cross in no time. On both ranks it stands before the first
operation that starts at that moment or later: on the sender right behind its maker, on the receiver
behind what is running then. So there is one total order of all operations and transfers that every
rank's order is a part of, and ranks that wait for each other in it cannot form a circle.
"""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest

from dsv3_jax.parallel.orders import Item, Message, Operation, Schedule, Transfer
from dsv3_jax.parallel.simulator import Span, spans_of

# A pair as long as B alone: places found so cost nothing for any pair from B to F + B. With F + B
# too many operations end together, and shorter pairs lose a part of what they gain.
DURATIONS = {"F": 1, "B": 2, "b": 1, "W": 1, "FB": 2}


@dataclass(frozen=True)
class _Sent:
    """A message on its way."""

    moment: float
    source: int
    target: int
    message: Message


def with_transfers(schedule: Schedule) -> tuple[tuple[Item, ...], ...]:
    """The orders of a schedule of operations, with its transfers.

    Of neighbours, messages that cross between the same operations share a transfer, one each way.
    """
    spans = spans_of(schedule, lambda _, operation: DURATIONS[operation.kind])
    starts: list[list[float]] = [[] for _ in range(schedule.ranks)]
    for span in spans:
        starts[span.rank].append(span.start)
    slots: dict[tuple[int, int, int], list[_Sent]] = defaultdict(list)
    for sent in (sent for span in spans for sent in _messages(schedule, span)):
        left = min(sent.source, sent.target)
        places = (bisect_left(starts[rank], sent.moment) for rank in (left, left + 1))
        slots[left, *places].append(sent)
    # Pairs that share no rank first all at once, then the others: every second pair.
    by_moment = sorted(slots, key=lambda s: (max(m.moment for m in slots[s]), s[0] % 2, s[0]))
    before = [defaultdict(list) for _ in range(schedule.ranks)]  # rank, place -> transfers
    for left, *places in by_moment:
        swaps = _swaps(left, slots[left, *places])
        for rank, place in zip((left, left + 1), places, strict=True):
            before[rank][place] += swaps
    return tuple(_woven(schedule.operations(rank), before[rank]) for rank in range(schedule.ranks))


def _messages(schedule: Schedule, span: Span) -> list[_Sent]:
    """What an operation's result sends to other ranks."""
    operation, goes = span.operation, []
    if work := operation.forward:
        goes.append(("activation", work.microbatch, schedule.after(span.rank, work)))
    if operation.gives_gradient:
        work = operation.backward
        goes.append(("gradient", work.microbatch, schedule.before(span.rank, work)))
    return [
        _Sent(span.end, span.rank, place[0], Message(kind, microbatch, place[1]))
        for kind, microbatch, place in goes
        if place is not None and place[0] != span.rank
    ]


def _swaps(left: int, sent: list[_Sent]) -> list[Transfer]:
    """Messages of one pair and slot, two and two."""
    sent = sorted(sent, key=lambda each: (each.moment, each.message.kind))
    rightward = [each.message for each in sent if each.source == left]
    leftward = [each.message for each in sent if each.source != left]
    return [Transfer(left, *pair) for pair in zip_longest(rightward, leftward)]


def _woven(
    operations: tuple[Operation, ...], before: dict[int, list[Transfer]]
) -> tuple[Item, ...]:
    """A rank's order; transfers by the place of the operation that they stand before."""
    order: list[Item] = []
    for place in range(len(operations) + 1):
        order += before.get(place, [])
        order += operations[place : place + 1]
    return tuple(order)
