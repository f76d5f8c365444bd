"""The programs of a run compiled for all of its devices, emulated on one CPU, from shapes alone:
what they take and give, held against the closed forms of `plan/memory.py`.

Ranks whose stages are built alike have the same programs; each distinct one is compiled once. Bytes
are those of one device, read out of the compiled programs' own arguments and results. What XLA:CPU
needs beside them is told apart: it expands FP8 to float32 and merges little.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.schedules import Schedule, make
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.plan.compiled import CompiledPlan, CompiledRank, Program
from dsv3_jax.plan.cuts import cuts_of, schedule_name
from dsv3_jax.plan.memory import fullest, memory_of
from dsv3_jax.train.pipeline_layout import Layout
from dsv3_jax.train.pipeline_programs import PassPrograms, compiling, kinds_of
from dsv3_jax.train.rank_programs import RankPrograms
from dsv3_jax.train.sharding import WHOLE
from dsv3_jax.train.step import Coefficients

# A third of the time; what programs take and give is the same.
QUICK = {"xla_backend_optimization_level": 0}
COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
Say = Callable[[str], None]


def compile_run(cfg: RunConfig, say: Say = lambda line: None) -> CompiledPlan:
    """Compiles all programs of a run's full-batch step. ValueError if devices are lacking, or for a
    run without a pipeline, whose step is a single program.
    """
    start = time.monotonic()
    if cfg.mesh.pipe == 1:
        raise ValueError(
            "mesh.pipe is 1, and a step without a pipeline is one program whose residuals cannot "
            "be told apart; allowed: 2 or more"
        )
    run = _Run(cfg)
    compiled = run.compile(say)
    return CompiledPlan(
        run.plan,
        tuple(program for _, program in compiled.values()),
        tuple(run.ranks(compiled)),
        {str(cut): run.measured(compiled, cut, "F") for cut in dict.fromkeys(run.cuts)},
        {str(cut): run.measured(compiled, cut, "b") for cut in dict.fromkeys(run.cuts)},
        time.monotonic() - start,
        _peak_bytes(),
    )


Key = tuple[str, tuple]


class _Run:
    """A run's layout, and which of its ranks are alike."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self.cuts, self.plan = cfg, cuts_of(cfg), memory_of(cfg)
        self.layout = Layout(cfg, make_mesh(cfg.mesh), self.cuts)
        self.rows = cfg.train.rows // cfg.train.microbatches
        name = schedule_name(cfg, cfg.train.microbatches)
        self.schedule: Schedule = make(name, cfg.mesh.pipe, cfg.train.microbatches)

    def shape(self, cut: Cut) -> tuple:
        """What a stage's programs depend on."""
        dense = self.cfg.model.num_dense_layers
        counts = len(cut.layers(0, dense)), len(cut.layers(dense, self.cfg.model.num_layers))
        return (*counts, cut.embed, cut.head, cut.end_mtp - cut.first_mtp)

    def signature(self, rank: int) -> tuple:
        """What a rank's programs depend on."""
        chunks = self.layout.chunks(rank)
        kept = tuple(self.layout.rank_of(stage) == rank for stage in chunks.values())
        return (*(self.shape(self.cuts[stage]) for stage in chunks.values()), kept)

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
                        jobs[key] = stages, lowered, threads.submit(_compiled, lowered)
            return {
                key: (lowered, _program(key[0], stages, *job.result(), say))
                for key, (stages, lowered, job) in jobs.items()
            }

    def _programs(self, rank: int) -> Iterator[tuple[Key, str, Callable[[], Any]]]:
        """Key, stages, and how to lower it."""
        programs = RankPrograms(self.layout, rank, self.rows, QUICK)
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
        both = " and ".join(written.values())
        for name, f, arguments, signature, stages in _around(programs, both):
            signature = signature or self.signature(rank)
            yield (name, signature), stages, lambda f=f, a=arguments: f.lower(*a)

    # --- what they say ---------------------------------------------------------------------------

    def measured(self, compiled: Mapping[Key, Any], cut: Cut, letter: str) -> tuple[int, int]:
        """Of a stage, the residuals of F or the tape of b: compiled and planned bytes."""
        from dsv3_jax.plan.kept import Kept

        kept, place = Kept(self.cfg), {"F": 1, "b": 2}[letter]
        lowered, _ = compiled[letter, (self.shape(cut),)]
        size = _size(lowered.out_info[place])
        return size, sum(kept.residuals(cut).values()) if letter == "F" else kept.tape(cut)

    def ranks(self, compiled: Mapping[Key, Any]) -> Iterator[CompiledRank]:
        """Every rank's bytes."""
        for planned in self.plan.ranks:
            rank, signature = planned.rank, self.signature(planned.rank)
            stages = list(self.layout.chunks(rank).values())
            sizes = [
                [self.measured(compiled, self.cuts[stage], letter)[0] for stage in stages]
                for letter in ("F", "b")
            ]
            owned = [s for s in stages if self.layout.rank_of(s) == rank]
            states = [compiled["update", self.shape(self.cuts[s])][0] for s in owned]
            yield CompiledRank(
                planned,
                _size(compiled["prepare", signature][0].out_info[0]),
                sum(_size(lowered.out_info[0]) for lowered in states),
                _size(compiled["zeros", signature][0].out_info[0]),
                fullest(self.schedule, rank, *sizes).size,
            )


def _around(programs: RankPrograms, both: str) -> Iterator[tuple]:
    """A rank's programs around its passes: name, function, arguments, what it depends on (None: on
    the rank), stages.
    """
    layout = programs.layout
    mine, others = programs.mine, programs.others
    yield "prepare", programs.prepare, (mine, others), None, both
    weights, _ = jax.eval_shape(programs.prepare, mine, others)
    yield "zeros", programs.zeros, (weights,), None, both
    sums, told = jax.eval_shape(programs.zeros, weights)
    yield "reduce", programs.reduce, (sums,), None, both
    grads = jax.eval_shape(programs.reduce, sums)
    keys = {key for key, (stage, _) in programs.keys.items() if stage in programs.owned}
    grads = {key: grads[key] for key in keys}
    arrived = [
        {key: grads[key] for key in held[programs.rank]}
        for held in map(layout.borrowed, range(layout.ranks))
        if programs.rank in held
    ]
    yield "tally", programs.tally, (told, grads, arrived), None, both
    grads, tally = jax.eval_shape(programs.tally, told, grads, arrived)
    place = NamedSharding(programs.mesh, WHOLE)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
    for stage in programs.owned:
        sharding = layout.shardings[stage]
        state = sharding.placed_shapes(layout.abstract(stage))
        cut, model = layout.cuts[stage], layout.cfg.model
        counts = [
            len(cut.layers(0, model.num_dense_layers)),
            len(cut.layers(model.num_dense_layers, model.num_layers)),
        ]
        shape = (*counts, cut.embed, cut.head, cut.end_mtp - cut.first_mtp)
        arguments = state, grads, tally, Coefficients(*[scalar] * len(Coefficients._fields))
        yield "update", programs.update(stage), arguments, shape, str(cut)


def _compiled(lowered: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return lowered.compile(), time.monotonic() - start


def _program(name: str, stages: str, compiled: Any, seconds: float, say: Say) -> Program:
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    say(f"{name:8} {stages}: {seconds:.0f} s")
    return Program(
        name,
        stages,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        float(costs.get("flops", 0.0)),
        dict(Counter(found)),
    )


def _size(tree: Any) -> int:
    """Bytes on one device of arrays that know where they lie."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _peak_bytes() -> int:
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
