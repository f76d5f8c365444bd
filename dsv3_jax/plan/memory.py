"""What a run holds on each device, in closed form, before it runs (report 3.2.3, 3.3.3).

    weights + masters + moments + sums of gradients
    + the micro-batches between F and W: residuals until b, operands of W's products after it
    + workspace: what programs need for themselves, an estimate

The first two lines stay from operation to operation, and `plan/compile.py` reads the same out of
compiled programs. Sets between b and W are larger than before it, so the fullest moment of a rank
is not always that of most sets; the orders of the schedule are walked through.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import mul
from typing import Any, NamedTuple

from dsv3_jax.config import QuantConfig, RunConfig
from dsv3_jax.parallel.schedules import Schedule
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.plan.cuts import (
    check_pipeline,
    cuts_of,
    layer_counts,
    microbatch_counts,
    schedule_name,
)
from dsv3_jax.plan.kept import Kept
from dsv3_jax.plan.moments import Key, Moment, check_size, fullest_moments, moments_of, orders
from dsv3_jax.plan.parameters import GRADIENT_BYTES, Parameters
from dsv3_jax.plan.traffic import gather_of


@dataclass(frozen=True)
class Live:
    """Micro-batches on a rank at its fullest moment, by chunk."""

    residuals: Mapping[int, int]
    """Between F and b, or B"""
    tapes: Mapping[int, int]
    """Between b and W"""
    size: int
    """Bytes"""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each device of one pipeline rank."""

    rank: int
    stages: tuple[str, ...]
    """As cuts are written"""
    weights: int
    masters: int
    moments: int
    gradients: int
    residuals: int
    """Of all micro-batches before their b, at the fullest moment"""
    tapes: int
    """Of all between b and W, then"""
    live: Live
    terms_of_workspace: Mapping[str, int]

    @property
    def workspace(self) -> int:
        """Of a program beside what stays, estimated."""
        return sum(self.terms_of_workspace.values())

    @property
    def persistent(self) -> Mapping[str, int]:
        """What stays from operation to operation, by term."""
        names = "weights", "masters", "moments", "gradients", "residuals", "tapes"
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Without workspace."""
        return sum(self.persistent.values())

    @property
    def dominant(self) -> str:
        """The largest term."""
        return max(self.persistent, key=self.persistent.__getitem__)


class Exchange(NamedTuple):
    """What one layer's exchange with experts on other devices sends and receives in a round."""

    rows: int
    """Of both hops' buckets on a device"""
    size: int
    """Bytes of these rows in the activations' dtype"""
    factor: float
    """Times the share of a device under even routing"""


@dataclass(frozen=True)
class MemoryPlan:
    """Of one run."""

    cfg: RunConfig
    ranks: tuple[RankMemory, ...]

    @property
    def exchange(self) -> Exchange | None:
        """None where all experts are at hand."""
        if self.cfg.mesh.expert_shards == 1:
            return None
        kept = Kept(self.cfg)
        rows = kept.rows.hop_1 + kept.rows.hop_2
        size = rows * self.cfg.model.d_model * kept.item
        return Exchange(rows, size, self.cfg.mesh.bucket_factor)

    @property
    def fullest(self) -> RankMemory:
        """The rank whose devices hold most, workspace included."""
        return max(self.ranks, key=lambda rank: rank.total + rank.workspace)

    @property
    def heaviest(self) -> RankMemory:
        """The one that decides whether a run fits: workspace, an estimate, does not count."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def most(self) -> int:
        """Bytes on its devices, without workspace."""
        return self.heaviest.total

    def needs(self, workspace: bool) -> int:
        """Bytes on the devices that take most, with workspace or without."""
        return self.fullest.total + self.fullest.workspace if workspace else self.most

    def exceeds(self, capacity: float) -> float:
        """Bytes by which the heaviest rank is above what a device has; 0 if it fits."""
        return max(0.0, self.most - capacity)


def memory_of(cfg: RunConfig, parameters: Parameters | None = None) -> MemoryPlan:
    """Of a run as configured; `parameters` of its model on its mesh, if there are some already.
    ValueError for a pipeline that cannot be, or that would take too long to simulate.
    """
    check_pipeline(cfg)
    check_size(cfg.mesh.pipe, max(microbatch_counts(cfg)))
    return MemoryPlan(cfg, tuple(_Ranks(cfg, parameters or Parameters(cfg)).all))


class _Ranks:
    """What ranks have in common."""

    def __init__(self, cfg: RunConfig, parameters: Parameters) -> None:
        self.cfg, self.parameters, self.kept = cfg, parameters, Kept(cfg)
        # What is computed again in a layer is there for its own backward pass alone.
        self.again = Kept(replace(cfg, train=replace(cfg.train, remat="none")))
        self.cuts = cuts_of(cfg)
        self.schedules = tuple(_schedules(cfg))

    @cached_property
    def residuals(self) -> tuple[int, ...]:
        """Of one micro-batch, by stage."""
        return tuple(sum(self.kept.residuals(cut).values()) for cut in self.cuts)

    @cached_property
    def tapes(self) -> tuple[int, ...]:
        return tuple(map(self.kept.tape, self.cuts))

    @property
    def all(self) -> Iterator[RankMemory]:
        schedule, moments = orders(*self.schedules[0]), fullest_moments(self.schedules)
        for rank in range(schedule.ranks):
            stages = [schedule.stage(rank, chunk) for chunk in range(schedule.chunks)]
            cuts = tuple(self.cuts[stage] for stage in stages)
            owned = [
                self.parameters.state(self.cuts[s]) for s in stages if schedule.home(s)[0] == rank
            ]
            sizes = [self.residuals[s] for s in stages], [self.tapes[s] for s in stages]
            live = _fullest(moments[rank], *sizes)
            yield RankMemory(
                rank,
                tuple(map(str, cuts)),
                self._weights(cuts),
                sum(state["masters"] for state in owned),
                sum(state["moments"] for state in owned),
                self._sums * self.parameters.gradients(cuts),
                sum(count * sizes[0][chunk] for chunk, count in live.residuals.items()),
                sum(count * sizes[1][chunk] for chunk, count in live.tapes.items()),
                live,
                max(map(self._workspace, cuts), key=lambda terms: sum(terms.values())),
            )

    def _weights(self, cuts: tuple[Cut, ...]) -> int:
        plain = self.cfg.mesh.pipe == 1
        return self.parameters.gathered(cuts) if plain else self.parameters.weights(cuts)

    @property
    def _sums(self) -> int:
        """Of gradients. A plain step's micro-batch makes its own, which are then added to those of
        all before it; what stages make is added up linear by linear.
        """
        return 2 if self.cfg.mesh.pipe == 1 and self.cfg.train.microbatches > 1 else 1

    def _workspace(self, cut: Cut) -> Mapping[str, int]:
        """Of one layer's backward pass, or of the head; an estimate for compilers that keep no
        more than that at once.

        The exchange's bound is `parallel/dispatch.py`'s. Logits, their gradient and one more stand
        in quarters of the micro-batch's tokens (`model/cross_entropy.py`), and the head's gradient
        once.
        """
        model, rows, item = self.cfg.model, self.kept.rows, self.kept.item
        has_moe = cut.has_mtp or layer_counts(model, cut)[1]
        layer = self.again.moe_layer if has_moe else self.again.dense_layer
        kept = self.kept.moe_layer if has_moe else self.kept.dense_layer
        terms = {"recomputation": max(0, sum(layer.values()) - sum(kept.values()))}
        if gather := gather_of(self.cfg):
            terms["latents of rows"] = gather.held
        if has_moe:
            wide_rows = 4 * (rows.hop_1 + rows.hop_2 + rows.blocks)
            buckets = wide_rows * model.d_model + 3 * rows.blocks * model.expert_hidden
            terms["exchange and experts"] = buckets * item
            experts = model.num_experts // self.cfg.mesh.expert_shards
            gradients = 6 * experts * model.d_model * model.expert_hidden * GRADIENT_BYTES
            terms["experts' gradients"] = gradients
        if not (cut.head or cut.has_mtp):
            return terms
        logits = (3 * rows.tokens // 4 + model.d_model) * model.vocab_size * self.kept.high
        return {"logits and head": logits} if logits > sum(terms.values()) else terms


def _schedules(cfg: RunConfig) -> Iterator[Key]:
    """Of every step size, the largest first: `check_pipeline` has seen that this one is the run's
    own schedule, with all of its copies of stages.
    """
    for count in microbatch_counts(cfg):
        yield schedule_name(cfg, count), cfg.mesh.pipe, count


def fullest(schedule: Schedule, rank: int, residuals: list[int], tapes: list[int]) -> Live:
    """The moment at which a rank's micro-batches take most, of their bytes by chunk."""
    return _fullest(moments_of(schedule, rank), residuals, tapes)


def _fullest(moments: list[Moment], residuals: list[int], tapes: list[int]) -> Live:
    def size(moment: Moment) -> int:
        sets, left = moment
        return sum(map(mul, sets, residuals)) + sum(map(mul, left, tapes))

    sets, left = most = max(moments, key=size)
    return Live(dict(enumerate(sets)), dict(enumerate(left)), size(most))


# --- what to change ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Of a configuration, and what it holds then on its fullest rank."""

    text: str
    """As options of a command"""
    most: int
    devices: int
    """That it takes"""


def changes_of(plan: MemoryPlan, workspace: bool = False) -> list[Change]:
    """What would hold less, with workspace or without, least memory first; nothing that cannot
    be.
    """
    found = []
    for text, sections in _candidates(plan.cfg):
        try:
            other = memory_of(replace(plan.cfg, **sections))
        except ValueError:
            continue
        if other.needs(workspace) < plan.needs(workspace):
            found.append(Change(text, other.needs(workspace), other.cfg.mesh.size))
    return sorted(found, key=lambda change: change.most)


def _candidates(cfg: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options, and the sections of the configuration that they make."""
    train, mesh = cfg.train, cfg.mesh
    for remat in ("report", "full"):
        if remat != train.remat:
            yield f"--train.remat {remat}", {"train": replace(train, remat=remat)}
    if cfg.quant.recipe != "fp8":
        yield "--quant.recipe fp8", {"quant": QuantConfig("fp8")}
    if mesh.bucket_factor > 1:
        yield "--mesh.bucket-factor 1.0", {"mesh": replace(mesh, bucket_factor=1.0)}
    if train.rows // train.microbatches > mesh.row_groups:
        count = train.rows // mesh.row_groups
        yield f"--train.microbatches {count}", {"train": replace(train, microbatches=count)}
    for sequence in ("local", "node_local"):
        if mesh.sequence == "none":
            yield f"--mesh.sequence {sequence}", {"mesh": replace(mesh, sequence=sequence)}
    for axis in ("data", "local", "pipe"):
        size = 2 * getattr(mesh, axis)
        yield f"--mesh.{axis} {size}", {"mesh": replace(mesh, **{axis: size})}
