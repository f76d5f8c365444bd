"""Orders of DualPipe and of its V-shaped sibling: the eight steps (report 3.2.1, Figure 5).

Micro-batches enter at both ends of a DualPipe and meet forward and backward in one program (FB), in
which the exchange of one hides behind the other's products. A V of ranks does the same with half as
many devices: each micro-batch goes down the first leg and up the second one.

On every rank, direction 0 is the one whose input end is nearer. With h the number of ranks to the
middle (all ranks of a V), k the distance to the nearer end and n micro-batches in a direction:

    1  h-k-1 times   F0 F0
    2  k+1           F0 F1
    3  h-k-1         b1 W F1       W takes the oldest weight gradients that a b has left behind
    4  n-2h+k+1      F0B1 F1B0     in the middle, the first pair apart: there B1 waits for F0
    5  h-k-1         B1 F1B0
    6  k+1           B1 B0         b from halfway on: W will fill the gaps to come
    7  h-k-1         W b0
    8  k+1           W
"""

from collections import deque
from itertools import count

from dsv3_jax.parallel.orders import Operation, Work


def dualpipe_orders(ranks: int, microbatches: int) -> list[list[Operation]]:
    """Of each rank; the first half of the micro-batches runs from rank 0 up, in chunk 0."""
    half, orders = microbatches // 2, []
    for rank in range(ranks):
        near = 0 if rank < ranks // 2 else 1  # chunk that has direction 0 here
        steps = eight_steps(min(rank, ranks - 1 - rank), ranks // 2, half)
        orders.append(_numbered(steps, chunks=(near, 1 - near), firsts=(0, half)))
    return orders


def dualpipev_orders(ranks: int, microbatches: int) -> list[list[Operation]]:
    """Of each rank; every micro-batch runs up in chunk 0 and down again in chunk 1."""
    steps = [eight_steps(rank, ranks, microbatches) for rank in range(ranks)]
    return [_numbered(each, chunks=(0, 1), firsts=(0, 0)) for each in steps]


def eight_steps(k: int, h: int, n: int) -> list[str]:
    """A rank's operations in order, with directions: F0, b1, W, F0B1."""
    outer = h - k - 1
    main = ["F0B1", "F1B0"] * (n - 2 * h + k + 1)
    if outer == 0:
        main[:1] = ["F0", "B1"]
    steps = ["F0"] * 2 * outer + ["F0", "F1"] * (k + 1) + ["b1", "W", "F1"] * outer
    steps += main + ["B1", "F1B0"] * outer
    # 2k+2 backward halves, of which the last k+1 leave their weight gradients behind
    steps += [f"{'B' if i < k + 1 else 'b'}{1 - i % 2}" for i in range(2 * k + 2)]
    return steps + ["W", "b0"] * outer + ["W"] * (k + 1)


def _numbered(
    steps: list[str], chunks: tuple[int, int], firsts: tuple[int, int]
) -> list[Operation]:
    """With micro-batches in place of directions: `chunks` of the two directions, and the first
    micro-batch of each chunk.
    """
    counts = {(kind, chunk): count(firsts[chunk]) for kind in "FB" for chunk in (0, 1)}
    waiting: deque[Work] = deque()

    def work(kind: str, direction: str) -> Work:
        chunk = chunks[int(direction)]
        return Work(next(counts[kind.upper(), chunk]), chunk)

    operations = []
    for step in steps:
        match tuple(step):
            case ("W",):
                operations.append(Operation("W", backward=waiting.popleft()))
            case ("F", direction):
                operations.append(Operation("F", forward=work("F", direction)))
            case ("B" | "b" as kind, direction):
                operations.append(Operation(kind, backward=work(kind, direction)))
                if kind == "b":
                    waiting.append(operations[-1].backward)
            case ("F", one, "B", other):
                operations.append(Operation("FB", work("F", one), work("B", other)))
    return operations
