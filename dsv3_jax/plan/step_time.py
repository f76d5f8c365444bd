"""How long a step takes: stages' times in the simulated schedule, ZeRO-1, update (report 3.2)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from dsv3_jax.parallel.orders import TWO_CHUNKS, Operation, Schedule
from dsv3_jax.parallel.schedules import Timeline, make
from dsv3_jax.parallel.simulator import timeline_of
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.plan.cuts import check_pipeline, cuts_of, schedule_name
from dsv3_jax.plan.layer_time import (
    Job,
    Time,
    check_job,
    forward_time,
    input_gradient_time,
    weight_gradient_time,
)
from dsv3_jax.plan.moments import check_size, counts, orders
from dsv3_jax.plan.products import Item, items_in
from dsv3_jax.plan.traffic import (
    ZeroTraffic,
    exchange_of,
    message_bytes,
    weights_of,
    zero_traffic,
)


@dataclass(frozen=True)
class StageTime:
    """Of one stage and micro-batch."""

    cut: Cut
    forward: Time
    inputs: Time
    """b"""
    weights: Time
    """W"""

    @property
    def backward(self) -> Time:
        """B = b + W."""
        return self.inputs + self.weights


@dataclass(frozen=True)
class Overlap:
    """How a fused pair runs."""

    on: bool
    slower: float
    """Factor on computation beside which communication holds SMs"""

    def pair(self, time: Time) -> float:
        """Of F and B of two micro-batches in one program: the exchange of one hides behind the
        computation of the other, unless that would cost more than it saves.
        """
        if not self.on or self.gives_up(time):
            return time.alone
        return self._beside(time)

    def gives_up(self, time: Time) -> bool:
        """Whether hiding the exchange would cost more than it saves."""
        return self.on and self._beside(time) > time.alone

    def _beside(self, time: Time) -> float:
        return max(time.compute * self.slower, time.exchange)


@dataclass(frozen=True)
class StepTime:
    """One step of so many micro-batches."""

    rows: int
    timeline: Timeline
    sync: float
    """Seconds of ZeRO-1's scatter and gather, and of DualPipe's swap of copies"""
    update: float
    """Seconds of the optimiser"""

    @property
    def seconds(self) -> float:
        return self.timeline.makespan + self.sync + self.update

    @property
    def schedule(self) -> str:
        return self.timeline.schedule.name


class Stepper:
    """Predicts steps of a run. ValueError, one line, for a run that cannot be."""

    def __init__(self, job: Job, overlap: bool = True) -> None:
        check_pipeline(job.cfg)
        check_job(job)
        self.job, self.cfg = job, job.cfg
        communicates = exchange_of(job.cfg) is not None
        self.overlap = Overlap(overlap, job.hardware.slower if communicates else 1.0)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Of every stage."""
        return cuts_of(self.cfg)

    @cached_property
    def stages(self) -> tuple[StageTime, ...]:
        """Times of every stage."""
        known: dict[Item, tuple[Time, Time, Time]] = {}  # layers are alike
        return tuple(self._stage(cut, known) for cut in self.cuts)

    def _stage(self, cut: Cut, known: dict[Item, tuple[Time, Time, Time]]) -> StageTime:
        forward = inputs = weights = Time()
        for item in items_in(self.cfg.model, cut):
            if item not in known:
                times = (forward_time, input_gradient_time, weight_gradient_time)
                known[item] = tuple(time(self.job, item) for time in times)
            f, b, w = known[item]
            forward, inputs, weights = forward + f, inputs + b, weights + w
        return StageTime(cut, forward, inputs, weights)

    @property
    def message(self) -> float:
        """Seconds of a pipeline message, from node to node where ranks have nodes of their own."""
        mesh, hardware = self.cfg.mesh, self.job.hardware
        inside = mesh.size <= hardware.devices_per_node.value
        link = hardware.nvlink if inside else hardware.ib
        return message_bytes(self.cfg) / link.value

    def step(self, rows: int) -> StepTime:
        """Of a step of so many rows."""
        schedule = self._schedule(rows)
        timeline = timeline_of(schedule, self._lasts(schedule), self._transfer)
        return StepTime(rows, timeline, self._sync, self._update)

    def least(self, rows: int) -> float:
        """Seconds that such a step takes at least: without idle time of the rank that works most.
        No simulation, so that a search can leave most of them out.
        """
        schedule = self._schedule(rows)
        lasts = self._lasts(schedule)
        known = counts(schedule.name, schedule.ranks, schedule.microbatches)
        work = (sum(n * lasts(rank, op) for op, n in c.items()) for rank, c in enumerate(known))
        return max(work) + self._sync + self._update

    @property
    def _transfer(self) -> float | None:
        """Beside computation messages cross unseen; else both neighbours stop for them."""
        return None if self.overlap.on or self.cfg.mesh.pipe == 1 else self.message

    @property
    def _sync(self) -> float:
        link = self.job.hardware.ib if self._crosses_nodes else self.job.hardware.nvlink
        return self.zero.total / link.value

    @property
    def _update(self) -> float:
        return self.zero.update / self.job.hardware.streamed.value

    @property
    def _crosses_nodes(self) -> bool:
        """Whether ZeRO-1's groups are larger than a node."""
        return self.cfg.mesh.token_shards > self.job.hardware.devices_per_node.value

    @cached_property
    def zero(self) -> ZeroTraffic:
        """Of the rank that moves most."""
        each = []
        for held, owned in self.rank_cuts:
            mastered = weights_of(self.cfg, owned, borrowed=False)
            each.append(zero_traffic(self.cfg, weights_of(self.cfg, held), mastered))
        return max(each, key=lambda traffic: traffic.total)

    @property
    def rank_cuts(self) -> Iterator[tuple[tuple[Cut, ...], tuple[Cut, ...]]]:
        """Of every rank: stages that it computes with, and those whose masters it has."""
        cuts, ranks = self.cuts, self.cfg.mesh.pipe
        dual = ranks > 1 and self.cfg.pipeline.schedule in TWO_CHUNKS
        for rank in range(ranks):
            held = (cuts[rank], cuts[-1 - rank]) if dual else (cuts[rank],)
            yield held, held[:1] if len(cuts) == ranks else held

    def _schedule(self, rows: int) -> Schedule:
        ranks = self.cfg.mesh.pipe
        microbatches = rows * self.cfg.train.microbatches // self.cfg.train.rows
        check_size(ranks, microbatches)
        made = orders if self._transfer is None else _made
        return made(schedule_name(self.cfg, microbatches), ranks, microbatches)

    def _lasts(self, schedule: Schedule) -> Callable[[int, Operation], float]:
        """Seconds of an operation on a rank, by the stages that it works on."""

        def lasts(rank: int, operation: Operation) -> float:
            works = (operation.forward, operation.backward)
            forward, backward = (w and self.stages[schedule.stage(rank, w.chunk)] for w in works)
            match operation.kind:
                case "F":
                    return forward.forward.alone
                case "FB":
                    return self.overlap.pair(forward.forward + backward.backward)
                case "B":
                    return backward.backward.alone
                case "b":
                    return backward.inputs.alone
            return backward.weights.alone

        return lasts


_made = lru_cache(32)(make)  # a search and what-ifs ask for the same ones again
