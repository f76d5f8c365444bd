"""Orders of the schedules: each work once, each message once and used, room for memory, names."""

from collections import Counter

import pytest
from hypothesis import given, settings

from dsv3_jax.parallel.schedules import (
    NAMES,
    Message,
    Operation,
    Schedule,
    Transfer,
    Work,
    check,
    fits,
    make,
)
from tests.parallel.orders_twin import can_run, results, schedules


@settings(max_examples=40)
@given(schedules())
def test_every_stage_sees_every_microbatch_once_forward_and_backward(schedule: Schedule):
    done = Counter(
        result
        for rank in range(schedule.ranks)
        for operation in schedule.operations(rank)
        for result in results(schedule, rank, operation)
    )
    assert set(done.values()) == {1}
    assert len(done) == 3 * schedule.microbatches * schedule.stages


@settings(max_examples=40)
@given(schedules())
def test_every_message_is_sent_once_and_used_later(schedule: Schedule):
    crossings = schedule.ranks - 1
    legs = 2 if schedule.name == "dualpipev" else 1
    received = 0
    for rank, order in enumerate(schedule.orders):
        waiting: set[Message] = set()
        for item in order:
            if isinstance(item, Transfer):
                message = item.received_by(rank)
                assert message not in waiting
                waiting |= {message} if message else set()
                received += message is not None
            else:
                waiting -= set(used(item))
        assert not waiting, rank
    assert received == 2 * schedule.microbatches * crossings * legs


def used(operation: Operation) -> list[Message]:
    """Messages that an operation may take in."""
    taken = []
    if work := operation.forward:
        taken.append(Message("activation", work.microbatch, work.chunk))
    if operation.gives_gradient:
        work = operation.backward
        taken.append(Message("gradient", work.microbatch, work.chunk))
    return taken


@settings(max_examples=40)
@given(schedules())
def test_neighbours_have_the_same_transfers_in_the_same_order(schedule: Schedule):
    for left in range(schedule.ranks - 1):
        here, there = (
            [item for item in schedule.orders[rank] if isinstance(item, Transfer)]
            for rank in (left, left + 1)
        )
        assert [t for t in here if t.left == left] == [t for t in there if t.left == left]
        assert all(t.rightward or t.leftward for t in here)


@settings(max_examples=40)
@given(schedules())
def test_a_machine_that_blocks_at_transfers_runs_every_schedule(schedule: Schedule):
    assert can_run(schedule)


def test_swaps_carry_both_ways_in_the_steady_state():
    """Of DualPipe's 280 messages at 8 ranks and 20 micro-batches, 116 pairs share a swap."""
    schedule = make("dualpipe", 8, 20)
    swaps = {item for order in schedule.orders for item in order if isinstance(item, Transfer)}
    full = [swap for swap in swaps if swap.rightward and swap.leftward]
    assert (len(swaps), len(full)) == (164, 116)


def test_a_swap_stands_behind_what_the_receiver_was_running():
    """1F1B, 2 ranks: F0 ends on rank 0 when rank 1 idles, F1 while rank 1 runs F0."""
    schedule = make("1f1b", 2, 2)
    assert [str(item) for item in schedule.orders[1]] == [
        "0|1: activation 0 →",
        "F0",
        "0|1: activation 1 →",
        "B0",
        "0|1: ← gradient 0",
        "F1",
        "B1",
        "0|1: ← gradient 1",
    ]


def test_places_of_the_two_ways_and_of_the_v():
    dual, vee = make("dualpipe", 4, 8), make("dualpipev", 4, 8)
    assert (dual.chunks, dual.stages, vee.chunks, vee.stages) == (2, 4, 2, 8)
    assert [dual.stage(rank, 0) for rank in range(4)] == [0, 1, 2, 3]
    assert [dual.stage(rank, 1) for rank in range(4)] == [3, 2, 1, 0]
    assert [vee.stage(rank, 1) for rank in range(4)] == [7, 6, 5, 4]
    assert [dual.home(stage) for stage in range(4)] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [vee.home(stage) for stage in range(8)] == list(vee.route(0))
    assert [dual.chunks_of(i) for i in (0, 3, 4, 7)] == [(0,), (0,), (1,), (1,)]
    assert vee.chunks_of(5) == (0, 1)
    assert vee.after(3, Work(5, 0)) == (3, 1)
    assert (dual.after(0, Work(7, 1)), dual.before(0, Work(7, 1))) == (None, (1, 1))


def test_operations_read_as_letters():
    schedule = make("dualpipe", 2, 4)
    assert " ".join(map(str, schedule.operations(0))) == "F0 F2' F1 B2' F3'B0 B3' b1 W1"
    assert str(schedule.operations(1)[-2]) == "b3'"


def test_zb1p_on_three_ranks_keeps_w_behind_by_the_rank():
    schedule = make("zb1p", 3, 4)
    assert [" ".join(map(str, schedule.operations(rank))) for rank in range(3)] == [
        "F0 F1 F2 b0 W0 F3 b1 W1 b2 W2 b3 W3",
        "F0 F1 b0 F2 b1 W0 F3 b2 W1 b3 W2 W3",
        "F0 b0 F1 b1 F2 b2 W0 F3 b3 W1 W2 W3",
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "said"),
    [
        ("interleaved", 2, 4, "'interleaved'; allowed: gpipe, 1f1b, zb1p, dualpipe, dualpipev"),
        ("1f1b", 0, 4, "1f1b: ranks are 0; allowed: 1 or more"),
        ("gpipe", 2, 0, "gpipe on 2 ranks: micro-batches are 0; allowed: 1 or more"),
        ("gpipe", 1, 0, "gpipe on 1 rank: micro-batches are 0; allowed: 1 or more"),
        ("dualpipe", 3, 8, "dualpipe: ranks are 3; allowed: even, 2 or more"),
        ("dualpipe", 0, 8, "ranks are 0; allowed: even, 2 or more"),
        ("dualpipe", 4, 9, "dualpipe on 4 ranks: micro-batches are 9; allowed: even, 8 or more"),
        ("dualpipe", 4, 6, "micro-batches are 6; allowed: even, 8 or more"),
        ("dualpipev", 4, 7, "micro-batches are 7; allowed: 8 or more"),
    ],
)
def test_what_does_not_fit_is_told_with_what_is_allowed(name, ranks, microbatches, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make(name, ranks, microbatches)
    if name in NAMES:
        assert not fits(name, ranks, microbatches)
    else:
        with pytest.raises(ValueError, match="allowed"):
            fits(name, ranks, microbatches)


def test_the_least_that_each_schedule_needs_fits():
    for name, ranks, microbatches in (
        ("gpipe", 5, 1),
        ("1f1b", 5, 1),
        ("zb1p", 5, 1),
        ("dualpipe", 6, 12),
        ("dualpipev", 3, 6),
        ("dualpipev", 1, 3),
    ):
        check(name, ranks, microbatches)
        assert fits(name, ranks, microbatches)
