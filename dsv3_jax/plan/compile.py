"""The programs of a run compiled for all of its devices, emulated on one CPU, from shapes alone:
what they take and give, held against the closed forms of `plan/memory.py`.

Ranks whose stages are built alike have the same programs; each distinct one is compiled once. Bytes
are those of one device, read out of the compiled programs' own arguments and results. What XLA:CPU
needs beside them is told apart: it expands FP8 to float32 and merges little.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.schedules import Schedule, make
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.plan.compile_step import compile_step
from dsv3_jax.plan.compiled import CompiledPlan, CompiledRank, Program
from dsv3_jax.plan.cuts import cuts_of, layer_counts, schedule_name
from dsv3_jax.plan.kept import Kept
from dsv3_jax.plan.lowered import Say, compiled_with_time, device_bytes, program_of
from dsv3_jax.plan.memory import fullest, memory_of
from dsv3_jax.train.machine import peak_memory
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_programs import PassPrograms, compiling, kinds_of
from dsv3_jax.train.rank_programs import RankPrograms
from dsv3_jax.train.sharding import WHOLE
from dsv3_jax.train.step import UNOPTIMISED, Coefficients


def compile_run(cfg: RunConfig, say: Say = lambda line: None) -> CompiledPlan:
    """Compiles all programs of a run's full-batch step. ValueError if devices are lacking."""
    if cfg.mesh.pipe == 1:
        return compile_step(cfg, say)
    start = time.monotonic()
    run = _Run(cfg)
    compiled = run.compile(say)
    return CompiledPlan(
        run.plan,
        tuple(program for _, program in compiled.values()),
        tuple(run.ranks(compiled)),
        {name: run.residuals(compiled, cut) for name, cut in run.kinds.items()},
        {name: run.tape(compiled, cut) for name, cut in run.kinds.items()},
        time.monotonic() - start,
        peak_memory(),
    )


Key = tuple[str, tuple]
Called = tuple[Any, tuple]  # a jitted function, and its arguments' shapes


class _Run:
    """A run's layout, and which of its ranks are alike."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.cuts, self.plan, self.kept = cfg, cuts_of(cfg), memory_of(cfg), Kept(cfg)
        self.layout = Layout(cfg, make_mesh(cfg.mesh), self.cuts)
        self.rows = cfg.train.rows // cfg.train.microbatches
        name = schedule_name(cfg, cfg.train.microbatches)
        self.schedule: Schedule = make(name, cfg.mesh.pipe, cfg.train.microbatches)

    def shape(self, cut: Cut) -> tuple:
        """What a stage's programs depend on."""
        return (*layer_counts(self.cfg.model, cut), cut.embed, cut.head, cut.num_mtp)

    def signature(self, rank: int) -> tuple:
        """What a rank's programs depend on."""
        chunks = self.layout.chunks(rank)
        kept = tuple(self.layout.rank_of(stage) == rank for stage in chunks.values())
        return (*(self.shape(self.cuts[stage]) for stage in chunks.values()), kept)

    @property
    def kinds(self) -> dict[str, Cut]:
        """The first stage of every shape, by its number and as written: dense layers and others are
        written alike.
        """
        found: dict[tuple, int] = {}
        for stage, cut in enumerate(self.cuts):
            found.setdefault(self.shape(cut), stage)
        return {f"{stage}: {self.cuts[stage]}": self.cuts[stage] for stage in found.values()}

    @cached_property
    def distinct(self) -> dict[tuple, int]:
        """The first rank of every signature."""
        found: dict[tuple, int] = {}
        for rank in range(self.layout.ranks):
            found.setdefault(self.signature(rank), rank)
        return found

    # --- compilation -----------------------------------------------------------------------------

    def compile(self, say: Say) -> dict[Key, tuple[Any, Program]]:
        """Every distinct program, by name and what it depends on."""
        jobs: dict[Key, tuple[str, Any, Future]] = {}
        with compiling() as threads:
            for rank in self.distinct.values():
                for key, stages, lower in self._programs(rank):
                    if key not in jobs:
                        lowered = lower()
                        say(f"{key[0]:8} {stages}")
                        jobs[key] = stages, lowered, threads.submit(compiled_with_time, lowered)
            return {
                key: (lowered, program_of(key[0], stages, *job.result(), say))
                for key, (stages, lowered, job) in jobs.items()
            }

    def _programs(self, rank: int) -> Iterator[tuple[Key, str, Callable[[], Any]]]:
        """Key, stages, and how to lower it."""
        programs = RankPrograms(self.layout, rank, self.rows, UNOPTIMISED)
        passes = PassPrograms(programs)
        written = {chunk: str(self.cuts[stage]) for chunk, stage in programs.stages.items()}
        shapes = {chunk: self.shape(self.cuts[stage]) for chunk, stage in programs.stages.items()}
        kinds = kinds_of(self.schedule.operations(rank))
        for kind in [*kinds, *(("b", c) for c in shapes if ("b", c) not in kinds)]:
            letter, chunk = kind
            fused = letter == "FB"
            key = letter, (shapes[chunk], shapes[1 - chunk]) if fused else (shapes[chunk],)
            stages = f"{written[chunk]} and {written[1 - chunk]}" if fused else written[chunk]
            yield key, stages, lambda kind=kind: passes.trace([kind])[kind]
        signature, both = self.signature(rank), " and ".join(written.values())
        around, updates = _around(programs)
        for name, (f, arguments) in around.items():
            yield (name, signature), both, partial(f.lower, *arguments)
        for stage, (f, arguments) in updates.items():
            cut = self.cuts[stage]
            yield ("update", self.shape(cut)), str(cut), partial(f.lower, *arguments)

    # --- what they say ---------------------------------------------------------------------------

    def residuals(self, compiled: Mapping[Key, Any], cut: Cut) -> tuple[int, int]:
        """Of a stage's F: compiled and planned bytes."""
        lowered, _ = compiled["F", (self.shape(cut),)]
        return device_bytes(lowered.out_info[1]), sum(self.kept.residuals(cut).values())

    def tape(self, compiled: Mapping[Key, Any], cut: Cut) -> tuple[int, int]:
        """Of a stage's b: the same."""
        lowered, _ = compiled["b", (self.shape(cut),)]
        return device_bytes(lowered.out_info[2]), self.kept.tape(cut)

    def ranks(self, compiled: Mapping[Key, Any]) -> Iterator[CompiledRank]:
        """Every rank's bytes."""
        for planned in self.plan.ranks:
            rank, signature = planned.rank, self.signature(planned.rank)
            stages = list(self.layout.chunks(rank).values())
            cuts = [self.cuts[stage] for stage in stages]
            residuals = [self.residuals(compiled, cut)[0] for cut in cuts]
            tapes = [self.tape(compiled, cut)[0] for cut in cuts]
            owned = [s for s in stages if self.layout.rank_of(s) == rank]
            states = [compiled["update", self.shape(self.cuts[s])][0] for s in owned]
            yield CompiledRank(
                planned,
                device_bytes(compiled["prepare", signature][0].out_info[0]),
                sum(device_bytes(lowered.out_info[0]) for lowered in states),
                device_bytes(compiled["zeros", signature][0].out_info[0]),
                fullest(self.schedule, rank, residuals, tapes).size,
            )


def _around(programs: RankPrograms) -> tuple[dict[str, Called], dict[int, Called]]:
    """A rank's programs around its passes, by name, and the update of every stage that it owns."""
    layout, mine, others = programs.layout, programs.mine, programs.others
    weights, _ = jax.eval_shape(programs.prepare, mine, others)
    sums, told = jax.eval_shape(programs.zeros, weights)
    grads = jax.eval_shape(programs.reduce, sums)
    keys = {key for key, (stage, _) in programs.keys.items() if stage in programs.owned}
    grads = {key: grads[key] for key in keys}
    arrived = [
        {key: grads[key] for key in held[programs.rank]}
        for held in map(layout.borrowed, range(layout.ranks))
        if programs.rank in held
    ]
    around = {
        "prepare": (programs.prepare, (mine, others)),
        "zeros": (programs.zeros, (weights,)),
        "reduce": (programs.reduce, (sums,)),
        "tally": (programs.tally, (told, grads, arrived)),
    }
    grads, tally = jax.eval_shape(programs.tally, told, grads, arrived)
    place = NamedSharding(programs.mesh, WHOLE)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
    coefficients = Coefficients(*[scalar] * len(Coefficients._fields))
    states = {
        stage: layout.shardings[stage].placed_shapes(layout.abstract(stage))
        for stage in programs.owned
    }
    return around, {
        stage: (programs.update(stage), (state, grads, tally, coefficients))
        for stage, state in states.items()
    }
