"""DualPipe's orders are the published ones, and its two shapes are one algorithm."""

import re

import pytest

from dsv3_jax.parallel.schedules import Schedule, make

# 8 ranks, 20 micro-batches, written down from a simulation of the report's Figure 5. Direction 0
# is the one whose input end is nearer; P01 is F of direction 0 with B of direction 1.
GOLDEN = (
    "F0*7 F1 (b1 W F1)*3 (P01 P10)*3 (B1 P10)*3 B1 b0 (W b0)*3 W",
    "F0*4 (F0 F1)*2 (b1 W F1)*2 (P01 P10)*4 (B1 P10)*2 B1 B0 b1 b0 (W b0)*2 W*2",
    "F0*2 (F0 F1)*3 b1 W F1 (P01 P10)*5 B1 P10 B1 B0 B1 b0 b1 b0 W b0 W*3",
    "(F0 F1)*4 F0 B1 P10 (P01 P10)*5 (B1 B0)*2 (b1 b0)*2 W*4",
)


def expanded(trace: str) -> list[str]:
    """Without parentheses and factors."""
    trace = re.sub(r"\(([^)]*)\)\*(\d)", lambda m: " ".join([m[1]] * int(m[2])), trace)
    return re.sub(r"(\w+)\*(\d)", lambda m: " ".join([m[1]] * int(m[2])), trace).split()


def directions(schedule: Schedule, rank: int, near: int) -> list[str]:
    """A rank's order in the golden traces' words, chunk `near` being direction 0."""
    words = []
    for operation in schedule.operations(rank):
        ways = [
            str(abs(work.chunk - near)) for work in (operation.forward, operation.backward) if work
        ]
        kind = {"FB": "P"}.get(operation.kind, operation.kind)
        words.append("W" if kind == "W" else kind + "".join(ways))
    return words


@pytest.mark.parametrize("rank", range(8))
def test_orders_of_8_ranks_are_the_golden_traces(rank: int):
    schedule = make("dualpipe", 8, 20)
    near = int(rank >= 4)
    assert directions(schedule, rank, near) == expanded(GOLDEN[min(rank, 7 - rank)])


@pytest.mark.parametrize("rank", range(4))
def test_a_v_of_4_ranks_runs_half_of_a_dualpipe_of_8(rank: int):
    """Ten micro-batches in each direction: the V's second leg is the DualPipe's other half."""
    assert directions(make("dualpipev", 4, 10), rank, 0) == expanded(GOLDEN[rank])


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_microbatches_go_through_each_chunk_in_order(name: str):
    schedule = make(name, 4, 16)
    for rank in range(4):
        for chunk in (0, 1):
            first, last = (8 * chunk, 8 * chunk + 8) if name == "dualpipe" else (0, 16)
            for side, kinds in (("forward", ("F", "FB")), ("backward", ("B", "b", "FB"))):
                works = [
                    getattr(operation, side)
                    for operation in schedule.operations(rank)
                    if operation.kind in kinds
                ]
                numbers = [work.microbatch for work in works if work.chunk == chunk]
                assert numbers == list(range(first, last))


def test_weight_gradients_are_taken_oldest_first():
    for rank in range(4):
        operations = make("dualpipe", 4, 10).operations(rank)
        left, taken = (
            [operation.backward for operation in operations if operation.kind == kind]
            for kind in ("b", "W")
        )
        assert left == taken
