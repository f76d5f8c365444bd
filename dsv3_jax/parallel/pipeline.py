"""The executor of pipeline schedules: walks the ranks' lists and hands programs to devices
(report 3.2.1).

It knows neither models nor meshes. What a rank's programs are comes in as `Rank`s, how messages
cross as `swap`; which operation comes when is the schedule's matter alone. JAX returns before a
program has run, so devices work side by side while the lists are walked.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from dsv3_jax.parallel.orders import Item, Message, Operation, Schedule, Transfer, Work


class Rank(Protocol):
    """A rank's programs. Arrays and trees are whatever they make of them."""

    def forward(self, work: Work, x: Any) -> tuple[Any, Any]:
        """F: input (None at the first stage) -> output, residuals."""

    def backward(self, work: Work, residuals: Any, dh: Any) -> Any:
        """B: residuals and the output's gradient (None at the last stage) -> the input's."""

    def input_gradients(self, work: Work, residuals: Any, dh: Any) -> tuple[Any, Any]:
        """b: the input's gradient, and a tape."""

    def weight_gradients(self, work: Work, tape: Any) -> None:
        """W."""

    def forward_and_backward(
        self, forward: Work, x: Any, backward: Work, residuals: Any, dh: Any
    ) -> tuple[Any, Any, Any]:
        """FB, one program: output and residuals of the one, the input's gradient of the other."""


# (left rank, what goes right, what goes left, whether something does each way) -> what the left
# rank gets, and the right one. Of ranks that are not here: None.
Swap = Callable[[int, Any, Any, tuple[bool, bool]], tuple[Any, Any]]
# Called after every item that was handed over, with what it gives.
Watch = Callable[[int, Item, Any], None]


class Executed(NamedTuple):
    """What a walk tells: by rank, the most residual sets that were alive at once."""

    peak: dict[int, int]


def execute(
    schedule: Schedule, ranks: Mapping[int, Rank], swap: Swap, watch: Watch | None = None
) -> Executed:
    """One step's passes of the ranks that are here. RuntimeError if the schedule does not go on."""
    desks = {rank: _Desk(schedule, rank, programs) for rank, programs in ranks.items()}
    for here, item in _walk(schedule, desks):
        if isinstance(item, Transfer):
            result = _transfer(item, desks, swap)
        else:
            result = desks[here].run(item)
        if watch:
            watch(here, item, result)
    return Executed({rank: desk.peak for rank, desk in desks.items()})


def _walk(schedule: Schedule, desks: Mapping[int, "_Desk"]) -> Iterator[tuple[int, Item]]:
    """Items of all ranks that are here, each when its turn has come and its inputs are there."""
    left = {rank: deque(schedule.orders[rank]) for rank in desks}
    while any(left.values()):
        moved = False
        for rank, items in left.items():
            while items and _is_ready(items[0], rank, left, desks):
                item = items.popleft()
                if isinstance(item, Transfer) and item.partner_of(rank) in left:
                    left[item.partner_of(rank)].popleft()
                yield rank, item
                moved = True
        if not moved:
            stuck = {rank: str(items[0]) for rank, items in left.items() if items}
            raise RuntimeError(f"{schedule.name}: no rank can go on; next are {stuck}")


def _is_ready(
    item: Item, rank: int, left: Mapping[int, deque[Item]], desks: Mapping[int, "_Desk"]
) -> bool:
    if not isinstance(item, Transfer):
        return desks[rank].has_inputs_of(item)
    other = left.get(item.partner_of(rank))
    return other is None or (bool(other) and other[0] == item)


def _transfer(item: Transfer, desks: Mapping[int, "_Desk"], swap: Swap) -> tuple[Any, Any]:
    given = []
    for rank in (item.left, item.left + 1):
        message = item.sent_by(rank)
        given.append(desks[rank].out.pop(message) if message and rank in desks else None)
    ways = item.rightward is not None, item.leftward is not None
    got = swap(item.left, *given, ways)
    for rank, array in zip((item.left, item.left + 1), got, strict=True):
        message = item.received_by(rank)
        if message and rank in desks:
            desks[rank].inbox[message] = array
    return got


class _Desk:
    """What lies on a rank's desk: messages, residual sets and tapes."""

    def __init__(self, schedule: Schedule, rank: int, programs: Rank) -> None:
        self.schedule, self.rank, self.programs = schedule, rank, programs
        self.inbox: dict[Message, Any] = {}
        self.out: dict[Message, Any] = {}
        self.sets: dict[Work, Any] = {}
        self.tapes: dict[Work, Any] = {}
        self.peak = 0

    def has_inputs_of(self, operation: Operation) -> bool:
        wanted = [self._input(operation.forward)] if operation.forward else []
        wanted += [self._gradient(operation.backward)] if operation.gives_gradient else []
        return all(message is None or message in self.inbox for message in wanted)

    def run(self, operation: Operation) -> Any:
        """Hands an operation to the rank's devices, puts its results where they belong."""
        forward, backward = operation.forward, operation.backward
        x = self._taken(self._input(forward)) if forward else None
        dh = self._taken(self._gradient(backward)) if operation.gives_gradient else None
        programs, h, dx = self.programs, None, None
        match operation.kind:
            case "F":
                h, self.sets[forward] = programs.forward(forward, x)
            case "B":
                dx = programs.backward(backward, self.sets[backward], dh)
            case "b":
                residuals = self.sets.pop(backward)
                dx, self.tapes[backward] = programs.input_gradients(backward, residuals, dh)
            case "W":
                programs.weight_gradients(backward, self.tapes[backward])
            case "FB":
                residuals = self.sets[backward]
                h, self.sets[forward], dx = programs.forward_and_backward(
                    forward, x, backward, residuals, dh
                )
        self.peak = max(self.peak, len(self.sets) + len(self.tapes))
        if operation.frees:
            (self.tapes if operation.kind == "W" else self.sets).pop(backward)
        if forward:
            self._deliver("activation", forward, self.schedule.after(self.rank, forward), h)
        if operation.gives_gradient:
            self._deliver("gradient", backward, self.schedule.before(self.rank, backward), dx)
        return h, dx

    def _input(self, work: Work) -> Message | None:
        before = self.schedule.before(self.rank, work)
        return Message("activation", work.microbatch, work.chunk) if before else None

    def _gradient(self, work: Work) -> Message | None:
        after = self.schedule.after(self.rank, work)
        return Message("gradient", work.microbatch, work.chunk) if after else None

    def _taken(self, message: Message | None) -> Any:
        return None if message is None else self.inbox.pop(message)

    def _deliver(self, kind: str, work: Work, to: tuple[int, int] | None, array: Any) -> None:
        if to is None:
            return
        rank, chunk = to
        box = self.inbox if rank == self.rank else self.out
        box[Message(kind, work.microbatch, chunk)] = array
