"""Which meshes and schedules a run fits on, and which is fastest (report 3.2).

Every mesh of so many devices whose axes divide what they spread, with every schedule that takes the
run's micro-batches, of one row a device each; each with the least recomputation that fits. A step
takes no less than its busiest rank works, so layouts are simulated in the order of that, and only
until the next one could not be among the fastest.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dsv3_jax.config import MeshConfig, PipelineConfig, RunConfig
from dsv3_jax.plan.cuts import check_pipeline, microbatch_counts
from dsv3_jax.plan.hardware import Hardware, WhatIf
from dsv3_jax.plan.layer_time import Job, check_job
from dsv3_jax.plan.memory import MemoryPlan, memory_of
from dsv3_jax.plan.moments import LARGEST, check_size
from dsv3_jax.plan.parameters import Parameters, traced
from dsv3_jax.plan.prediction import Prediction, predict

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
REMATS = ("none", "report", "full")  # fastest first, since each computes more again
Told = Callable[[str, int, int], None]
"""Of what is being done, how many of how many"""


@dataclass(frozen=True)
class Ask:
    """What is searched for, beside the run."""

    hardware: Hardware
    devices: int
    top: int
    """Layouts to find"""
    what_if: WhatIf | None = None
    overlap: bool = True
    price: float | None = None
    """US dollars per device-hour"""


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    prediction: Prediction
    memory: MemoryPlan

    @property
    def cfg(self) -> RunConfig:
        return self.memory.cfg

    @property
    def seconds(self) -> float:
        """Of a step with all rows."""
        return self.prediction.step.seconds

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in the passes of a step."""
        return self.prediction.step.timeline.idle_share

    @property
    def options(self) -> str:
        """That make the run's configuration this one."""
        return options_of(self.cfg)


@dataclass(frozen=True)
class Answer:
    """Of a search."""

    ask: Ask
    layouts: int
    """Meshes and schedules that the configuration allows"""
    fitting: int
    """Of these, with some recomputation"""
    fastest: tuple[Found, ...]
    """Fastest first, as many as were asked for"""
    nearest: MemoryPlan
    """What holds least on its fullest rank, of all"""

    @property
    def missing(self) -> float:
        """Bytes that even this one is above a device's memory; 0 if it fits."""
        return self.nearest.exceeds(self.ask.hardware.memory.value)


def search(cfg: RunConfig, ask: Ask, told: Told = lambda doing, done, of: None) -> Answer:
    """Of a run; its own mesh, schedule, micro-batches and remat do not count.

    ValueError, one line, if there is no layout of so many devices at all.
    """
    _check(cfg, ask)
    layouts = list(_layouts(cfg, ask))
    if not layouts:
        raise ValueError(
            f"--devices is {ask.devices:,}; allowed: numbers with a mesh whose node x local divides"
            f" the {cfg.model.num_experts} experts, and whose data x node x local divides "
            f"train.rows = {cfg.train.rows:,} (and each of schedule.rows_phases), with mesh.pipe x "
            f"train.microbatches up to {LARGEST:,}"
        )
    capacity, model = ask.hardware.memory.value, traced(cfg.model)
    plans, nearest, parameters = [], None, {}
    for done, layout in enumerate(layouts):
        told("memory", done, len(layouts))
        known = parameters.setdefault(layout.mesh, Parameters(layout, model))
        for plan in (memory_of(each, known) for each in _recomputing(layout)):
            if nearest is None or plan.most < nearest.most:
                nearest = plan
            if not plan.exceeds(capacity):
                plans.append(plan)
                break
    fastest = _fastest(plans, ask, told)
    return Answer(ask, len(layouts), len(plans), fastest, nearest)


def _check(cfg: RunConfig, ask: Ask) -> None:
    """ValueError for what no layout could change."""
    if ask.top < 1:
        raise ValueError(f"--top is {ask.top}; allowed: 1 or more")
    alone = replace(cfg, mesh=MeshConfig(), pipeline=PipelineConfig())
    check_job(Job(alone, ask.hardware))


def _fastest(plans: list[MemoryPlan], ask: Ask, told: Told) -> tuple[Found, ...]:
    waiting = []
    for number, plan in enumerate(plans):
        told("bounds of step times", number, len(plans))
        found = _predicted(plan, ask)
        least = found.prediction.stepper.least(plan.cfg.train.rows)
        waiting.append((least * (1 - 1e-9), number, found))  # sums in another order differ
    heapq.heapify(waiting)
    known: list[tuple[float, int, Found]] = []
    while waiting and (len(known) < ask.top or waiting[0][0] < known[ask.top - 1][0]):
        told("step times", len(plans) - len(waiting), len(plans))
        _, number, found = heapq.heappop(waiting)
        known.append((found.seconds, number, found))
        known.sort()
    return tuple(found for _, _, found in known[: ask.top])


def _predicted(plan: MemoryPlan, ask: Ask) -> Found:
    asked = {"what_if": ask.what_if, "overlap": ask.overlap, "price": ask.price}
    return Found(predict(plan.cfg, ask.hardware, **asked), plan)


# --- layouts -------------------------------------------------------------------------------------


def _layouts(cfg: RunConfig, ask: Ask) -> Iterator[RunConfig]:
    """All that the configuration's checks allow, each with one row a device, or group of devices
    that share it, and micro-batch.
    """
    for mesh in _meshes(cfg, ask):
        microbatches, left = divmod(cfg.train.rows, mesh.row_groups)
        if left:
            continue
        train = replace(cfg.train, microbatches=microbatches)
        for schedule in SCHEDULES if mesh.pipe > 1 else SCHEDULES[:1]:
            try:
                layout = replace(cfg, mesh=mesh, train=train, pipeline=PipelineConfig(schedule))
                check_size(mesh.pipe, max(microbatch_counts(layout)))
                check_pipeline(layout)
            except ValueError:
                continue
            yield layout


def _meshes(cfg: RunConfig, ask: Ask) -> Iterator[MeshConfig]:
    """Of so many devices, with nodes no larger than the hardware's."""
    per_node = int(ask.hardware.devices_per_node.value)
    for pipe in _divisors(ask.devices):
        for node in _divisors(ask.devices // pipe):
            for local in _divisors(ask.devices // pipe // node):
                if per_node % local == 0:
                    data = ask.devices // (pipe * node * local)
                    yield replace(cfg.mesh, pipe=pipe, data=data, node=node, local=local)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _recomputing(layout: RunConfig) -> Iterator[RunConfig]:
    """The least first."""
    for remat in REMATS:
        yield replace(layout, train=replace(layout.train, remat=remat))


def options_of(cfg: RunConfig) -> str:
    """Of mesh, schedule, micro-batches and recomputation, as a command takes them."""
    options = {f"mesh.{axis}": size for axis, size in cfg.mesh.sizes.items()} | {
        "pipeline.schedule": cfg.pipeline.schedule,
        "train.microbatches": cfg.train.microbatches,
        "train.remat": cfg.train.remat,
    }
    return " ".join(f"--{name} {value}" for name, value in options.items())
