"""The executor of schedules alone: ranks here compute numbers that tell where they have been."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.orders import Item
from dsv3_jax.parallel.pipeline import Executed, execute
from dsv3_jax.parallel.schedules import (
    NAMES,
    Message,
    Operation,
    Schedule,
    Transfer,
    Work,
    make,
    simulate,
)
from tests.parallel.orders_twin import schedules, with_order

SIZES = [
    *[("gpipe", ranks, count) for ranks, count in [(1, 1), (1, 4), (3, 2), (4, 9)]],
    *[("1f1b", ranks, count) for ranks, count in [(1, 3), (2, 1), (4, 4), (5, 13)]],
    *[("zb1p", ranks, count) for ranks, count in [(1, 3), (2, 1), (4, 4), (5, 13)]],
    *[("dualpipe", ranks, count) for ranks, count in [(2, 4), (2, 8), (4, 8), (6, 16), (8, 20)]],
    *[("dualpipev", ranks, count) for ranks, count in [(1, 2), (2, 4), (3, 7), (4, 8), (8, 20)]],
]


@dataclass
class Counting:
    """A rank whose numbers are lists of the stages that they went through."""

    schedule: Schedule
    rank: int
    done: list[Operation] = field(default_factory=list)
    weights: list[Work] = field(default_factory=list)
    """Whose weight gradients were made"""
    arrived: dict[Work, list[int]] = field(default_factory=dict)
    """At the last stage, of each forward pass the way it took"""
    returned: dict[Work, list[int]] = field(default_factory=dict)
    """At the first stage, of each backward pass"""

    def forward(self, work: Work, x: Any) -> tuple[Any, Any]:
        self.done.append(Operation("F", work))
        return self._forward(work, x)

    def backward(self, work: Work, residuals: Any, dh: Any) -> Any:
        self.done.append(Operation("B", backward=work))
        self.weights.append(work)
        return self._backward(work, residuals, dh)

    def input_gradients(self, work: Work, residuals: Any, dh: Any) -> tuple[Any, Any]:
        self.done.append(Operation("b", backward=work))
        return self._backward(work, residuals, dh), ("tape", work)

    def weight_gradients(self, work: Work, tape: Any) -> None:
        self.done.append(Operation("W", backward=work))
        assert tape == ("tape", work)
        self.weights.append(work)

    def forward_and_backward(
        self, forward: Work, x: Any, backward: Work, residuals: Any, dh: Any
    ) -> tuple[Any, Any, Any]:
        self.done.append(Operation("FB", forward, backward))
        self.weights.append(backward)
        return *self._forward(forward, x), self._backward(backward, residuals, dh)

    def _forward(self, work: Work, x: Any) -> tuple[Any, Any]:
        stage = self.schedule.stage(self.rank, work.chunk)
        assert (x is None) == (stage == 0)
        way = ("activation", work.microbatch, *([] if x is None else x[2]), stage)
        h = way[0], way[1], way[2:]
        assert x is None or x[:2] == h[:2]
        if stage == self.schedule.stages - 1:
            self.arrived[work] = list(h[2])
        return h, ("residuals", work)

    def _backward(self, work: Work, residuals: Any, dh: Any) -> Any:
        assert residuals == ("residuals", work)
        stage = self.schedule.stage(self.rank, work.chunk)
        assert (dh is None) == (stage == self.schedule.stages - 1)
        dx = "gradient", work.microbatch, (*(() if dh is None else dh[2]), stage)
        assert dh is None or dh[:2] == dx[:2]
        if stage == 0:
            self.returned[work] = list(dx[2])
        return dx


def swapped(left: int, right: Any, leftward: Any, ways: tuple[bool, bool]) -> tuple:
    """All ranks are here: what one sends, the other one gets."""
    assert (right is not None, leftward is not None) == ways
    return leftward, right


def walked(
    schedule: Schedule, watch: Callable[[int, Item, Any], None] | None = None
) -> tuple[Executed, dict[int, Counting]]:
    ranks = {rank: Counting(schedule, rank) for rank in range(schedule.ranks)}
    return execute(schedule, ranks, swapped, watch), ranks


@settings(max_examples=40)
@given(schedules())
def test_every_rank_does_its_operations_in_the_order_of_the_schedule(schedule: Schedule):
    _, ranks = walked(schedule)
    for rank, programs in ranks.items():
        assert tuple(programs.done) == schedule.operations(rank)


@settings(max_examples=40)
@given(schedules())
def test_every_microbatch_goes_through_all_stages_and_back(schedule: Schedule):
    """And each stage makes its weight gradients of each once."""
    _, ranks = walked(schedule)
    up = list(range(schedule.stages))
    for ways, expected in (("arrived", up), ("returned", up[::-1])):
        found = {w.microbatch: way for r in ranks.values() for w, way in getattr(r, ways).items()}
        assert found == dict.fromkeys(range(schedule.microbatches), expected)
    for rank, programs in ranks.items():
        works = [op.forward for op in schedule.operations(rank) if op.forward]
        assert sorted(programs.weights, key=str) == sorted(works, key=str)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_as_many_sets_live_at_once_as_simulated_on_every_rank(name, ranks, microbatches):
    """The executor counts what it holds, the simulator births and deaths in the order."""
    schedule = make(name, ranks, microbatches)
    executed, _ = walked(schedule)
    assert executed.peak == dict(enumerate(simulate(schedule).peak))


@settings(max_examples=40)
@given(schedules())
def test_sets_live_as_long_as_simulated_in_any_schedule(schedule: Schedule):
    assert walked(schedule)[0].peak == dict(enumerate(simulate(schedule).peak))


def test_peaks_are_the_published_ones():
    """Table 2: PP − r sets on rank r of 1F1B, PP + 1 on every rank of both DualPipes."""
    assert walked(make("1f1b", 4, 8))[0].peak == {0: 4, 1: 3, 2: 2, 3: 1}
    assert walked(make("zb1p", 4, 8))[0].peak == dict.fromkeys(range(4), 4)
    assert walked(make("dualpipe", 4, 8))[0].peak == dict.fromkeys(range(4), 5)
    assert walked(make("dualpipev", 4, 8))[0].peak == dict.fromkeys(range(4), 9)


@settings(max_examples=20)
@given(schedules())
def test_what_is_watched_is_all_items_each_once_with_its_results(schedule: Schedule):
    seen: list[tuple[int, Item, Any]] = []
    walked(schedule, lambda rank, item, result: seen.append((rank, item, result)))
    operations = [(rank, item) for rank, item, _ in seen if isinstance(item, Operation)]
    for rank in range(schedule.ranks):
        assert tuple(item for r, item in operations if r == rank) == schedule.operations(rank)
    transfers = [item for _, item, _ in seen if isinstance(item, Transfer)]
    every = {item for order in schedule.orders for item in order if isinstance(item, Transfer)}
    assert len(transfers) == len(every)
    assert set(transfers) == every
    for rank, item, result in seen:
        if isinstance(item, Operation):
            continue
        assert rank in (item.left, item.left + 1)
        for message, got in zip((item.leftward, item.rightward), result, strict=True):
            assert (message is None) == (got is None)
            assert message is None or got[:2] == (message.kind, message.microbatch)


class Elsewhere:
    """Ranks that are in another process: what crosses to them is kept, what they send is made up
    from the run in which all ranks are here.
    """

    def __init__(self, schedule: Schedule, here: set[int]) -> None:
        self.here, self.sent = here, {}
        self.left = [
            item
            for rank in sorted(here)
            for item in schedule.orders[rank]
            if isinstance(item, Transfer)
        ]
        self.calls: list[tuple[int, Any, Any, tuple[bool, bool]]] = []
        self.all: dict[tuple[int, bool, str, int], list] = {}

        def record(rank: int, item: Item, result: Any) -> None:
            if isinstance(item, Transfer):
                for right, got in zip((False, True), result, strict=True):
                    if got is not None:
                        self.all.setdefault((item.left, right), []).append(got)

        walked(schedule, record)

    def swap(self, left: int, right: Any, leftward: Any, ways: tuple[bool, bool]) -> tuple:
        self.calls.append((left, right, leftward, ways))
        assert left in self.here or left + 1 in self.here
        assert (right is not None) == (left in self.here and ways[0])
        assert (leftward is not None) == (left + 1 in self.here and ways[1])
        crossed = [
            self.all[left, rightward].pop(0) if way else None
            for rightward, way in zip((True, False), ways, strict=True)
        ]
        assert right in (None, crossed[0])
        assert leftward in (None, crossed[1])
        got_left = crossed[1] if left in self.here else None
        return got_left, crossed[0] if left + 1 in self.here else None


@settings(max_examples=40)
@given(schedules(), st.data())
def test_ranks_that_are_elsewhere_need_not_be_here(schedule: Schedule, data):
    """Those here do the same, and all their messages go through swap, the same on both sides."""
    here = data.draw(st.sets(st.integers(0, schedule.ranks - 1), min_size=1))
    others = Elsewhere(schedule, here)
    ranks = {rank: Counting(schedule, rank) for rank in here}
    executed = execute(schedule, ranks, others.swap)
    for rank, programs in ranks.items():
        assert tuple(programs.done) == schedule.operations(rank)
    peaks = simulate(schedule).peak
    assert executed.peak == {rank: peaks[rank] for rank in here}
    expected = {
        item for rank in here for item in schedule.orders[rank] if isinstance(item, Transfer)
    }
    assert len(others.calls) == len(expected)


def without(schedule: Schedule, rank: int, place: int) -> Schedule:
    order = list(schedule.orders[rank])
    del order[place]
    return with_order(schedule, rank, order)


def test_a_schedule_that_cannot_go_on_says_what_each_rank_waits_for():
    schedule = make("1f1b", 2, 2)
    assert str(schedule.orders[1][0]) == "0|1: activation 0 →"
    with pytest.raises(RuntimeError, match=r"1f1b: no rank can go on; next are .*1: 'F0'"):
        walked(without(schedule, 1, 0))


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_that_name_different_transfers_stop_the_walk(name: str):
    """Two transfers swapped in one rank's order: each waits for the other one."""
    schedule = make(name, 2, 4)
    order = list(schedule.orders[0])
    places = [i for i, item in enumerate(order) if isinstance(item, Transfer)]
    first, second = places[:2]
    order[first], order[second] = order[second], order[first]
    with pytest.raises(RuntimeError, match="no rank can go on"):
        walked(with_order(schedule, 0, order))


def test_a_rank_that_ends_before_its_neighbours_is_not_waited_for_forever():
    schedule = make("gpipe", 2, 1)
    with pytest.raises(RuntimeError, match=r"next are \{0: '0\|1: activation 0 →'\}"):
        walked(with_order(schedule, 1, []))


def test_an_operation_waits_for_its_gradient_as_for_its_activation():
    schedule = make("gpipe", 2, 1)
    order = [item for item in schedule.orders[0] if not isinstance(item, Transfer)]
    alone = replace(schedule, orders=(tuple(order), ()))
    with pytest.raises(RuntimeError, match=r"next are \{0: 'B0'\}"):
        execute(alone, {0: Counting(alone, 0)}, swapped)


def test_the_turning_point_of_a_v_needs_no_transfer():
    """The last rank's two chunks follow each other: its activation lies there already."""
    schedule = make("dualpipev", 1, 2)
    assert not any(isinstance(item, Transfer) for item in schedule.orders[0])
    _, ranks = walked(schedule)
    assert ranks[0].arrived[Work(1, 1)] == [0, 1]
    assert Message("activation", 1, 1) not in schedule.orders[0]
