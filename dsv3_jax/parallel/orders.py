"""What a pipeline schedule is made of: each rank's list of operations and transfers (report 3.2.1).

Letters, everywhere: F forward, B full backward, b input gradients only, W weight gradients, FB one
F and one B in a single program. Nothing here is computed; `schedules.make` builds the lists, the
simulator gives them times, and an executor walks them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

TWO_CHUNKS = ("dualpipe", "dualpipev")


@dataclass(frozen=True)
class Work:
    """One micro-batch in one of a rank's chunks."""

    microbatch: int
    chunk: int
    """Of the rank's model parts; dualpipe: 0 the copy that runs from rank 0 up, 1 the one that runs
    down; dualpipev: 0 the first leg of the V, 1 the second"""

    def __str__(self) -> str:
        return f"{self.microbatch}{self.chunk * chr(39)}"


@dataclass(frozen=True)
class Operation:
    """One program run on one rank; str() as in F3, b0', F4B1': the prime says chunk 1."""

    kind: Literal["F", "B", "b", "W", "FB"]
    forward: Work | None = None
    """Of F and FB"""
    backward: Work | None = None
    """Of B, b, W and FB"""

    def __post_init__(self) -> None:
        given = (self.forward is not None, self.backward is not None)
        assert given == (self.kind in ("F", "FB"), self.kind != "F"), self

    def __str__(self) -> str:
        if self.kind == "FB":
            return f"F{self.forward}B{self.backward}"
        return f"{self.kind}{self.backward or self.forward}"

    @property
    def gives_gradient(self) -> bool:
        """Whether the gradient of the chunk's input comes out."""
        return self.kind in ("B", "b", "FB")

    @property
    def frees(self) -> bool:
        """Whether nothing of the backward work's forward pass is needed any more."""
        return self.kind in ("B", "W", "FB")


@dataclass(frozen=True)
class Message:
    """What crosses: a micro-batch's activation going forward or its gradient going backward."""

    kind: Literal["activation", "gradient"]
    microbatch: int
    chunk: int
    """The receiver's, which consumes it"""

    def __str__(self) -> str:
        return f"{self.kind} {Work(self.microbatch, self.chunk)}"


@dataclass(frozen=True)
class Transfer:
    """Neighbours swap messages, one each way at most; stands in both ranks' orders, equal."""

    left: int
    """The other one is left + 1"""
    rightward: Message | None
    leftward: Message | None

    def __str__(self) -> str:
        said = [f"{self.rightward} →"] * (self.rightward is not None)
        said += [f"← {self.leftward}"] * (self.leftward is not None)
        return f"{self.left}|{self.left + 1}: {', '.join(said)}"

    def sent_by(self, rank: int) -> Message | None:
        """Of one of the two ranks."""
        return self.rightward if rank == self.left else self.leftward

    def received_by(self, rank: int) -> Message | None:
        """Of one of the two ranks."""
        return self.leftward if rank == self.left else self.rightward

    def partner_of(self, rank: int) -> int:
        """The other rank."""
        return 2 * self.left + 1 - rank


Item: TypeAlias = Operation | Transfer
Place: TypeAlias = tuple[int, int]  # rank, chunk


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order, for one step of so many micro-batches."""

    name: str
    ranks: int
    microbatches: int
    orders: tuple[tuple[Item, ...], ...]
    """Of each rank"""

    @property
    def chunks(self) -> int:
        """Model parts on a rank."""
        return 2 if self.name in TWO_CHUNKS else 1

    @property
    def stages(self) -> int:
        """Parts that the model is cut into; dualpipe holds each of them twice."""
        return 2 * self.ranks if self.name == "dualpipev" else self.ranks

    def stage(self, rank: int, chunk: int) -> int:
        """Which part of the model a rank's chunk is, counted from the input."""
        return self._stages[rank, chunk]

    def home(self, stage: int) -> Place:
        """The rank and chunk that own a stage's parameters: of dualpipe's two copies chunk 0's."""
        return self._homes[stage]

    def chunks_of(self, microbatch: int) -> tuple[int, ...]:
        """Chunks that a micro-batch goes through on every rank, in forward order."""
        if self.name == "dualpipev":
            return (0, 1)
        return (int(self.name == "dualpipe" and 2 * microbatch >= self.microbatches),)

    def route(self, microbatch: int) -> tuple[Place, ...]:
        """(rank, chunk) of every stage that a micro-batch goes through, in forward order."""
        return self._routes[self.chunks_of(microbatch)]

    def after(self, rank: int, work: Work) -> Place | None:
        """Where the activation of a rank's work goes to; None after the last stage."""
        route, stage = self.route(work.microbatch), self.stage(rank, work.chunk)
        return route[stage + 1] if stage + 1 < len(route) else None

    def before(self, rank: int, work: Work) -> Place | None:
        """Where the gradient of a rank's work goes to; None at the first stage."""
        stage = self.stage(rank, work.chunk)
        return self.route(work.microbatch)[stage - 1] if stage else None

    def operations(self, rank: int) -> tuple[Operation, ...]:
        """The rank's order without transfers."""
        return tuple(item for item in self.orders[rank] if isinstance(item, Operation))

    @cached_property
    def _routes(self) -> dict[tuple[int, ...], tuple[Place, ...]]:
        """By the chunks; chunk 0 runs from rank 0 up, chunk 1 from the last rank down."""
        up = tuple((rank, 0) for rank in range(self.ranks))
        down = tuple((rank, 1) for rank in reversed(range(self.ranks)))
        return {(0,): up, (1,): down, (0, 1): up + down}

    @cached_property
    def _stages(self) -> dict[Place, int]:
        ends = {self.chunks_of(0), self.chunks_of(self.microbatches - 1)}
        routes = [self._routes[chunks] for chunks in ends]
        return {place: stage for route in routes for stage, place in enumerate(route)}

    @cached_property
    def _homes(self) -> dict[int, Place]:
        places = sorted(self._stages, key=lambda place: -place[1])  # what comes later stays
        return {self._stages[place]: place for place in places}
