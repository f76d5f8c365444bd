"""Whether the orders of a schedule can run: inputs before uses, nothing twice, no deadlock."""

from dsv3_jax.parallel.orders import Message, Operation, Schedule, Transfer, Work


def check_orders(schedule: Schedule) -> None:
    """ValueError, one line, naming rank and operation, unless every rank has every input before it
    is used, each work is done once, and transfers that block find their partners.
    """
    for rank in range(schedule.ranks):
        _Walk(schedule, rank).check()
    _check_transfers(schedule)


class _Walk:
    """Along one rank's order; what it has by then."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule, self.rank = schedule, rank
        self.received: set[Message] = set()
        self.sent: set[Message] = set()
        self.done: set[tuple[str, Work]] = set()

    def check(self) -> None:
        """ValueError at the first item that lacks something, or at the end if work is left."""
        for item in self.schedule.orders[self.rank]:
            if isinstance(item, Transfer):
                self._swap(item)
            else:
                self._run(item)
        for microbatch in range(self.schedule.microbatches):
            for chunk in self.schedule.chunks_of(microbatch):
                for kind in ("F", "B", "W"):
                    if (kind, Work(microbatch, chunk)) not in self.done:
                        self._fail(f"{kind}{Work(microbatch, chunk)}", "is missing")

    def _run(self, operation: Operation) -> None:
        for work in filter(None, (operation.forward, operation.backward)):
            self._check_belongs(operation, work)
        if work := operation.forward:
            self._need_message(operation, "activation", work)
            self._do(operation, "F", work)
        if work := operation.backward:
            if operation.gives_gradient:
                self._need(operation, "F", work)
                self._need_message(operation, "gradient", work)
                self._do(operation, "B", work)
            if operation.frees:
                self._need(operation, "B", work)
                self._do(operation, "W", work)

    def _check_belongs(self, operation: Operation, work: Work) -> None:
        belongs = work.chunk in self.schedule.chunks_of(work.microbatch)
        if not (0 <= work.microbatch < self.schedule.microbatches and belongs):
            self._fail(operation, "belongs to no micro-batch and chunk of this schedule")

    def _do(self, operation: Operation, kind: str, work: Work) -> None:
        if (kind, work) in self.done:
            self._fail(operation, f"does again what was done: {kind}{work}")
        self.done.add((kind, work))

    def _need(self, operation: Operation, kind: str, work: Work) -> None:
        if (kind, work) not in self.done:
            name = kind if kind == "F" else "b"
            self._fail(operation, f"comes before {name}{work}")

    def _need_message(self, operation: Operation, kind: str, work: Work) -> None:
        """An activation from the stage before or a gradient from the one after."""
        side = self.schedule.before if kind == "activation" else self.schedule.after
        source = side(self.rank, work)
        if source is None:
            return
        if source[0] == self.rank:  # the turn of a V
            made = "F" if kind == "activation" else "B"
            self._need(operation, made, Work(work.microbatch, source[1]))
        elif Message(kind, work.microbatch, work.chunk) not in self.received:
            self._fail(operation, f"comes before its {kind} from rank {source[0]}")

    def _swap(self, transfer: Transfer) -> None:
        if self.rank not in (transfer.left, transfer.left + 1):
            self._fail(f"transfer {transfer}", "is of other ranks")
        if received := transfer.received_by(self.rank):
            self._once(transfer, received, self.received)
        if sent := transfer.sent_by(self.rank):
            self._once(transfer, sent, self.sent)
            self._check_made(transfer, sent)

    def _once(self, transfer: Transfer, message: Message, known: set[Message]) -> None:
        if message in known:
            self._fail(f"transfer {transfer}", f"carries {message} again")
        known.add(message)

    def _check_made(self, transfer: Transfer, message: Message) -> None:
        """That this rank has computed what it sends, and that the receiver is the right one."""
        made = "F" if message.kind == "activation" else "B"
        side = self.schedule.after if made == "F" else self.schedule.before
        target = (transfer.partner_of(self.rank), message.chunk)
        sources = [
            Work(message.microbatch, chunk)
            for chunk in self.schedule.chunks_of(message.microbatch)
            if side(self.rank, Work(message.microbatch, chunk)) == target
        ]
        if not sources:
            self._fail(f"transfer {transfer}", f"sends {message} where it does not go")
        if (made, sources[0]) not in self.done:
            name = "F" if made == "F" else "b"
            self._fail(f"transfer {transfer}", f"comes before {name}{sources[0]}, which it sends")

    def _fail(self, what: object, why: str) -> None:
        raise ValueError(f"{self.schedule.name}: rank {self.rank}: {what} {why}")


def _check_transfers(schedule: Schedule) -> None:
    """ValueError if ranks that stop at each transfer until the partner is there come to no end."""
    orders = [[t for t in order if isinstance(t, Transfer)] for order in schedule.orders]
    at = [0] * schedule.ranks

    def waits(rank: int) -> Transfer | None:
        return orders[rank][at[rank]] if at[rank] < len(orders[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in range(schedule.ranks - 1):
            while (swap := waits(rank)) and swap.left == rank and waits(rank + 1) == swap:
                at[rank] += 1
                at[rank + 1] += 1
                moved = True
    stuck = next((rank for rank in range(schedule.ranks) if waits(rank)), None)
    if stuck is not None:
        circle = _circle({r: t for r in range(schedule.ranks) if (t := waits(r))}, stuck)
        raise ValueError(f"{schedule.name}: deadlock: {'; '.join(circle)}")


def _circle(waiting: dict[int, Transfer], rank: int) -> list[str]:
    """Who waits for whom, from one rank on until one comes again or has ended."""
    said, seen = [], set()
    while rank in waiting and rank not in seen:
        seen.add(rank)
        partner = waiting[rank].partner_of(rank)
        said.append(f"rank {rank} waits for rank {partner} in transfer {waiting[rank]}")
        rank = partner
    if rank not in waiting:
        said.append(f"rank {rank} has ended")
    return said
