"""Simulated times and memory against formulas and slow twins; what cannot run is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.order_check import check_orders
from dsv3_jax.parallel.schedules import Message, Operation, Schedule, Transfer, Work, make, simulate
from tests.parallel.orders_twin import can_run, schedules, start_times, with_order

EVEN = range(2, 17, 2)


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("more", [0, 2, 10])
def test_dualpipe_idles_and_holds_what_the_formulas_say(ranks: int, more: int):
    """Table 2: (PP/2 - 1)(F&B + B - 3W) and PP + 1 chunks; on every rank if FB = F + B."""
    schedule = make("dualpipe", ranks, 2 * ranks + more)
    full = simulate(schedule)
    assert full.idle == (ranks - 2,) * ranks
    assert full.peak == (ranks + 1,) * ranks
    overlapped = simulate(schedule, FB=2.25)
    for middle in (ranks // 2 - 1, ranks // 2):
        assert overlapped.idle[middle] == (ranks / 2 - 1) * (2.25 + 2 - 3)
    assert overlapped.bubble == overlapped.idle[ranks // 2]


@pytest.mark.parametrize(
    ("ranks", "microbatches", "bubble", "peak"),
    [(4, 8, 2, 5), (8, 20, 6, 9), (8, 16, 6, 9), (16, 32, 14, 17)],
)
def test_dualpipe_has_the_published_figures(ranks, microbatches, bubble, peak):
    timeline = simulate(make("dualpipe", ranks, microbatches))
    assert (timeline.bubble, set(timeline.peak)) == (bubble, {peak})


def test_outer_ranks_of_a_dualpipe_idle_less_when_pairs_overlap():
    idle = simulate(make("dualpipe", 8, 20), FB=2.2).idle
    expected = [2.0, 2.8, 3.6, 3.6]
    assert idle == pytest.approx([*expected, *expected[::-1]])


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_v_idles_and_holds_as_a_dualpipe_of_twice_the_ranks(ranks: int, more: int):
    schedule = make("dualpipev", ranks, 2 * ranks + more)
    assert simulate(schedule).idle == (2 * ranks - 2,) * ranks
    assert simulate(schedule).peak == (2 * ranks + 1,) * ranks
    assert simulate(schedule, FB=2.25).idle[-1] == (ranks - 1) * (2.25 + 2 - 3)
    assert simulate(schedule, FB=2.25).bubble == (ranks - 1) * (2.25 + 2 - 3)


@settings(max_examples=50)
@given(
    ranks=st.integers(1, 10),
    microbatches=st.integers(1, 30),
    F=st.integers(1, 4),
    B=st.integers(2, 8),
)
def test_gpipe_and_1f1b_idle_alike_and_hold_n_and_pp_minus_r(ranks, microbatches, F, B):
    for name in ("gpipe", "1f1b"):
        timeline = simulate(make(name, ranks, microbatches), F=F, B=B)
        assert timeline.idle == ((ranks - 1) * (F + B),) * ranks
        held = [microbatches if name == "gpipe" else ranks - rank for rank in range(ranks)]
        assert timeline.peak == tuple(min(each, microbatches) for each in held)


@settings(max_examples=50)
@given(
    ranks=st.integers(1, 10),
    more=st.integers(0, 20),
    W=st.integers(1, 3),
    F=st.integers(0, 3),
    b=st.integers(0, 3),
)
def test_zb1p_idles_and_holds_what_the_formulas_say(ranks, more, W, F, b):
    """(PP - 1)(F + B - 2W), while W is no longer than F and b, which it stands in for."""
    F, B = F + W, b + W + W
    timeline = simulate(make("zb1p", ranks, ranks + more), F=F, B=B, W=W)
    assert timeline.idle == ((ranks - 1) * (F + B - 2 * W),) * ranks
    assert timeline.peak == (ranks,) * ranks


@settings(max_examples=50)
@given(schedule=schedules(8), W=st.floats(0.1, 1.9), FB=st.floats(0.1, 3))
def test_live_sets_are_bounded_whatever_the_times(schedule: Schedule, W: float, FB: float):
    timeline = simulate(schedule, W=W, FB=FB)
    ranks, n = schedule.ranks, schedule.microbatches
    room = {"gpipe": n, "dualpipe": ranks + 1, "dualpipev": 2 * ranks + 1}.get(schedule.name, ranks)
    assert max(timeline.peak) <= room
    assert timeline.peak == simulate(schedule).peak


@settings(max_examples=40)
@given(
    schedule=schedules(4),
    times=st.tuples(*[st.integers(1, 9)] * 4),
    transfer=st.sampled_from([None, 0, 1, 5]),
)
def test_starts_are_the_earliest_that_break_no_rule(schedule: Schedule, times, transfer):
    F, b, W, FB = times
    timeline = simulate(schedule, F=F, B=b + W, W=W, FB=FB, transfer=transfer)
    twin = start_times(schedule, {"F": F, "B": b + W, "b": b, "W": W, "FB": FB}, transfer)
    for rank in range(schedule.ranks):
        spans = [span for span in timeline.spans if span.rank == rank]
        assert [span.start for span in spans] == twin[rank]
        assert tuple(span.operation for span in spans) == schedule.operations(rank)


@settings(max_examples=50)
@given(schedule=schedules(), FB=st.sampled_from([2, 2.25, 2.5, 2.75, 3]))
def test_transfers_that_block_but_take_no_time_cost_nothing(schedule: Schedule, FB: float):
    """For every pair between B and F + B."""
    assert simulate(schedule, FB=FB, transfer=0).makespan == simulate(schedule, FB=FB).makespan


@pytest.mark.parametrize("FB", [2, 2.25, 2.5, 3])
def test_nor_do_they_on_16_ranks(FB: float):
    schedule = make("dualpipe", 16, 32)
    assert simulate(schedule, FB=FB, transfer=0).makespan == simulate(schedule, FB=FB).makespan


def test_measured_times_go_before_the_others_and_those_of_a_rank_before_those_of_a_kind():
    schedule = make("zb1p", 2, 2)
    assert simulate(schedule, measured={"B": 6, "W": 2}).idle == simulate(schedule, B=6, W=2).idle
    timeline = simulate(schedule, measured={"b": 5, (1, "b"): 7, (0, "F"): 2})
    lasted = {(s.rank, s.operation.kind): s.end - s.start for s in timeline.spans}
    expected = {"F": 2, "b": 5, "W": 1}, {"F": 1, "b": 7, "W": 1}
    assert lasted == {(r, kind): t for r in (0, 1) for kind, t in expected[r].items()}
    assert timeline.makespan == max(span.end for span in timeline.spans)
    assert timeline.idle == (timeline.makespan - 16, timeline.makespan - 18)
    assert timeline.idle_share == pytest.approx(sum(timeline.idle) / (2 * timeline.makespan))


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({"B": 1, "W": 1}, r"zb1p: time of b \(B - W\) is 0"),
        ({"F": float("nan")}, "time of F is nan; allowed: above 0, finite"),
        ({"measured": {(1, "W"): -2}}, "time of W on rank 1 is -2"),
        ({"transfer": -1}, "time of a transfer is -1; allowed: 0 or more"),
    ],
)
def test_times_that_are_none_are_refused(times: dict, said: str):
    with pytest.raises(ValueError, match=said):
        simulate(make("zb1p", 2, 2), **times)


def test_times_of_kinds_that_a_schedule_lacks_do_not_matter():
    plain = make("1f1b", 2, 2)
    assert simulate(plain, B=1, W=3, FB=-1).idle == simulate(plain, B=1).idle


# --- orders that cannot run ---


def place_of(schedule: Schedule, rank: int, text: str) -> int:
    return [str(item) for item in schedule.orders[rank]].index(text)


def moved(schedule: Schedule, rank: int, text: str, to: int) -> Schedule:
    """One item of a rank's order moved to another place."""
    order = list(schedule.orders[rank])
    item = order.pop(place_of(schedule, rank, text))
    return with_order(schedule, rank, [*order[:to], item, *order[to:]])


@pytest.mark.parametrize(
    ("name", "rank", "item", "to", "said"),
    [
        ("1f1b", 2, "B1", 0, "rank 2: B1 comes before F1"),
        ("1f1b", 3, "F1", 0, "rank 3: F1 comes before its activation from rank 2"),
        ("1f1b", 2, "B0", 5, "rank 2: B0 comes before its gradient from rank 3"),
        ("zb1p", 2, "W1", 4, "rank 2: W1 comes before b1"),
        ("1f1b", 1, "1|2: activation 0 →", 0, "comes before F0, which it sends"),
        ("dualpipe", 3, "W0", 0, "rank 3: W0 comes before b0"),
        ("dualpipev", 3, "F0'", 0, "rank 3: F0' comes before F0"),
    ],
)
def test_an_order_that_runs_something_before_its_input_is_refused(name, rank, item, to, said):
    with pytest.raises(ValueError, match=f"^{name}: .*{said}"):
        simulate(moved(make(name, 4, 8), rank, item, to))


def test_missing_and_repeated_operations_are_refused():
    schedule = make("dualpipe", 4, 8)
    for rank, order in enumerate(schedule.orders):
        place = next(i for i, item in enumerate(order) if getattr(item, "kind", "") == "FB")
        with pytest.raises(ValueError, match=f"rank {rank}: "):
            simulate(with_order(schedule, rank, [*order[:place], *order[place + 1 :]]))
        with pytest.raises(ValueError, match=f"rank {rank}: .* does again what was done"):
            simulate(with_order(schedule, rank, [*order[: place + 1], *order[place:]]))
    with pytest.raises(ValueError, match="rank 3: W7' is missing"):
        simulate(with_order(schedule, 3, list(schedule.orders[3][:-1])))


def test_a_dropped_transfer_leaves_a_rank_without_its_input():
    schedule = make("1f1b", 3, 3)
    for rank in (1, 2):
        place = place_of(schedule, rank, "1|2: activation 1 →")
        order = schedule.orders[rank]
        schedule = with_order(schedule, rank, [*order[:place], *order[place + 1 :]])
    with pytest.raises(ValueError, match="rank 2: F1 comes before its activation from rank 1"):
        simulate(schedule)


def test_a_transfer_that_only_one_rank_has_is_a_deadlock():
    schedule = make("1f1b", 3, 3)
    last = "0|1: ← gradient 2"
    order = [item for item in schedule.orders[1] if str(item) != last]
    said = f"^1f1b: deadlock: rank 0 waits for rank 1 in transfer {last[:3].replace('|', '.')}.*"
    with pytest.raises(ValueError, match=said + "; rank 1 has ended$"):
        simulate(with_order(schedule, 1, order))


def test_crossed_transfers_are_a_deadlock_that_names_who_waits_for_whom():
    schedule = make("1f1b", 2, 4)
    order = list(schedule.orders[0])
    swaps = [place for place, item in enumerate(order) if isinstance(item, Transfer)]
    one, other = swaps[0], swaps[1]
    assert other == one + 2  # F1 lies between, and is sent by the second
    order[one : other + 1] = [order[one + 1], order[other], order[one]]
    with pytest.raises(ValueError, match=r"deadlock: rank 0 waits for rank 1 .*; rank 1 waits for"):
        simulate(with_order(schedule, 0, order))


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (Transfer(0, Message("activation", 1, 0), None), "carries activation 1 again"),
        (Transfer(0, None, Message("gradient", 1, 0)), "rank 0: .* carries gradient 1 again"),
        (Transfer(0, Message("gradient", 1, 0), None), "sends gradient 1 where it does not go"),
        (Transfer(0, Message("activation", 1, 1), None), "sends activation 1' where it does not"),
        (Transfer(1, Message("activation", 1, 0), None), "rank 0: transfer 1.2: .* other ranks"),
        (Operation("F", Work(9, 0)), "rank 0: F9 belongs to no micro-batch and chunk"),
        (Operation("F", Work(1, 1)), "rank 0: F1' belongs to no micro-batch and chunk"),
    ],
)
def test_what_belongs_to_no_such_schedule_is_refused(planted, said: str):
    schedule = make("1f1b", 3, 3)
    with pytest.raises(ValueError, match=said):
        simulate(with_order(schedule, 0, [*schedule.orders[0], planted]))


@settings(max_examples=150)
@given(schedule=schedules(4).filter(lambda s: s.ranks > 1), data=st.data())
def test_the_check_refuses_exactly_what_a_machine_cannot_run(schedule: Schedule, data):
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    order = list(schedule.orders[rank])
    place = data.draw(st.integers(0, len(order) - 1))
    to = data.draw(st.integers(max(0, place - 4), min(len(order), place + 4)))
    item = order.pop(place)
    if data.draw(st.integers(0, 5)):  # else it is dropped
        order.insert(to, item)
    mutant = with_order(schedule, rank, order)
    try:
        check_orders(mutant)
    except ValueError:
        assert not can_run(mutant)
    else:
        assert can_run(mutant)
