"""Slow and obvious twins of what schedules are checked with and simulated by."""

from dataclasses import replace

from hypothesis import strategies as st

from dsv3_jax.parallel.schedules import NAMES, Operation, Schedule, Transfer, fits, make

Done = set[tuple[str, int, int]]  # "F", "B" or "W", micro-batch, stage


def schedules(most_ranks: int = 6) -> st.SearchStrategy[Schedule]:
    """Small ones of every kind."""
    sizes = st.tuples(
        st.sampled_from(NAMES), st.integers(1, most_ranks), st.integers(1, 3 * most_ranks)
    )
    return sizes.filter(lambda size: fits(*size)).map(lambda size: make(*size))


def with_order(schedule: Schedule, rank: int, order: list) -> Schedule:
    """One rank's order replaced."""
    orders = list(schedule.orders)
    orders[rank] = tuple(order)
    return replace(schedule, orders=tuple(orders))


def results(schedule: Schedule, rank: int, operation: Operation) -> Done:
    """What an operation computes."""
    done = set()
    if work := operation.forward:
        done.add(("F", work.microbatch, schedule.stage(rank, work.chunk)))
    if work := operation.backward:
        stage = schedule.stage(rank, work.chunk)
        kinds = {"B": "BW", "b": "B", "W": "W", "FB": "BW"}[operation.kind]
        done |= {(kind, work.microbatch, stage) for kind in kinds}
    return done


def needs(schedule: Schedule, rank: int, operation: Operation) -> Done:
    """What must have been computed before, on this rank or on another."""
    last, needed = schedule.stages - 1, set()
    for kind, microbatch, stage in results(schedule, rank, operation):
        if kind == "F" and stage > 0:
            needed.add(("F", microbatch, stage - 1))
        if kind == "B":
            needed.add(("F", microbatch, stage))
            if stage < last:
                needed.add(("B", microbatch, stage + 1))
        if kind == "W" and operation.kind == "W":
            needed.add(("B", microbatch, stage))
    return needed


def can_run(schedule: Schedule) -> bool:
    """Whether a machine of ranks that know what they have computed or received, and stop at each
    transfer until the other is there, does all the work, each part once.
    """
    at = [0] * schedule.ranks
    known: list[Done] = [set() for _ in at]
    computed: list[tuple[str, int, int]] = []

    def step(rank: int) -> bool:
        if at[rank] == len(schedule.orders[rank]):
            return False
        item = schedule.orders[rank][at[rank]]
        if isinstance(item, Transfer):
            return rank == item.left and swap(rank, rank + 1, item)
        if not needs(schedule, rank, item) <= known[rank]:
            return False
        known[rank] |= results(schedule, rank, item)
        computed.extend(results(schedule, rank, item))
        at[rank] += 1
        return True

    def swap(left: int, right: int, item: Transfer) -> bool:
        if schedule.orders[right][at[right] : at[right] + 1] != (item,):
            return False
        for source, target in ((left, right), (right, left)):
            if message := item.sent_by(source):
                stage = schedule.stage(target, message.chunk)
                stage += -1 if message.kind == "activation" else 1
                sent = ("F" if message.kind == "activation" else "B", message.microbatch, stage)
                if sent not in known[source] or sent in known[target]:
                    return False
                known[target].add(sent)
        at[left] += 1
        at[right] += 1
        return True

    while sum(step(rank) for rank in range(schedule.ranks)):
        pass
    ended = all(place == len(order) for place, order in zip(at, schedule.orders, strict=True))
    everything = {
        (kind, microbatch, stage)
        for kind in "FBW"
        for microbatch in range(schedule.microbatches)
        for stage in range(schedule.stages)
    }
    return ended and len(computed) == len(everything) and set(computed) == everything


def start_times(
    schedule: Schedule, times: dict[str, float], transfer: float | None
) -> list[list[float]]:
    """Of each rank's operations: raised from 0 until no rule is broken any more."""
    ends = [[0.0] * len(order) for order in schedule.orders]
    starts = [[0.0] * len(order) for order in schedule.orders]
    changed = True
    while changed:
        changed = False
        finished = {
            result: ends[rank][place]
            for rank, order in enumerate(schedule.orders)
            for place, item in enumerate(order)
            if isinstance(item, Operation)
            for result in results(schedule, rank, item)
        }
        for rank, order in enumerate(schedule.orders):
            for place, item in enumerate(order):
                start = ends[rank][place - 1] if place else 0.0
                if isinstance(item, Operation):
                    inputs = needs(schedule, rank, item)
                    start = max([start, *(finished[each] for each in inputs)])
                    lasts = times[item.kind]
                elif transfer is None:
                    lasts = 0.0
                else:
                    other = item.partner_of(rank)
                    there = schedule.orders[other].index(item)
                    start = max(start, ends[other][there - 1] if there else 0.0)
                    lasts = transfer
                changed |= (start, start + lasts) != (starts[rank][place], ends[rank][place])
                starts[rank][place], ends[rank][place] = start, start + lasts
    return [
        [s for s, item in zip(starts[rank], order, strict=True) if isinstance(item, Operation)]
        for rank, order in enumerate(schedule.orders)
    ]
