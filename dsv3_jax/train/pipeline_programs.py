"""The programs of a pipeline's ranks, compiled before a step needs them.

Every stage on every rank has its own: 30 small programs for DualPipe on four ranks. They are traced
one after the other, since passes of one stage refer to each other, and compiled side by side.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dsv3_jax.parallel.orders import Operation
from dsv3_jax.train.rank_programs import RankPrograms
from dsv3_jax.train.sharding import WHOLE
from dsv3_jax.train.stage import Numbers

Kind = tuple[str, int]  # letter, chunk; of FB the chunk of its F


def kinds_of(operations: Iterable[Operation]) -> list[Kind]:
    """What a rank's operations are made of, in order of first use. Where a chunk has b and W, its
    B is these two: one program less of five to compile.
    """
    kinds = {(op.kind, (op.forward or op.backward).chunk): None for op in operations}
    return [
        (letter, chunk)
        for letter, chunk in kinds
        if letter != "B" or not {("b", chunk), ("W", chunk)} <= set(kinds)
    ]


class PassPrograms:
    """Of one rank: F, B, b, W, FB by chunk."""

    def __init__(self, programs: RankPrograms) -> None:
        self.programs = programs
        self._compiled: dict[Kind, Future[Callable]] = {}
        self._lowered: dict[Kind, Any] = {}
        self._structs: tuple | None = None

    def __getitem__(self, kind: Kind) -> Callable:
        """Waits until it is compiled."""
        return self._compiled[kind].result()

    def __contains__(self, kind: Kind) -> bool:
        return kind in self._compiled

    @property
    def is_ready(self) -> bool:
        """Whether no compilation is under way."""
        return all(program.done() for program in self._compiled.values())

    def wait(self) -> None:
        """Until all is compiled that was begun; raises what that raised."""
        for program in self._compiled.values():
            program.result()

    def trace(self, kinds: Iterable[Kind]) -> dict[Kind, Any]:
        """Those of the kinds that are new, as JAX's lowered programs."""
        if self._structs is None:
            self._structs = self._noted()
        new = {kind: self._lower(kind) for kind in kinds if kind not in self._lowered}
        self._lowered |= new
        return new

    def begin(self, kinds: Sequence[Kind], threads: ThreadPoolExecutor) -> None:
        """Has the kinds compiled that are not yet."""
        self.trace(kinds)
        for kind in kinds:
            if kind not in self._compiled:
                self._compiled[kind] = threads.submit(self._lowered[kind].compile)

    def _noted(self) -> tuple:
        """Shapes of (weights, biases, sums, told, numbers), after tracing what passes refer to."""
        programs = self.programs
        weights, biases = jax.eval_shape(programs.prepare, programs.mine, programs.others)
        sums, told = jax.eval_shape(programs.zeros, weights)
        place = NamedSharding(programs.mesh, WHOLE)
        numbers = Numbers(
            jax.ShapeDtypeStruct((), jnp.int32, sharding=place),
            jax.ShapeDtypeStruct((), jnp.float32, sharding=place),
            jax.ShapeDtypeStruct((), programs.layout.high, sharding=place),
        )
        of_chunks = {}
        for chunk, stage in programs.stages.items():
            keys = programs.layout.keys[stage]
            own = {name: weights[key] for name, key in keys.items()}, biases[stage]
            passes = programs.chunks[chunk]
            passes.note(*own, passes.x, passes.batch, numbers)
            _, residuals, *_ = jax.eval_shape(
                passes.F,
                *own,
                passes.x,
                passes.batch,
                numbers,
                told[chunk],
                passes.added_to(sums, "F"),
            )
            of_chunks[chunk] = own, residuals
        return of_chunks, sums, told, numbers

    def _lower(self, kind: Kind) -> Any:
        letter, chunk = kind
        of_chunks, sums, told, numbers = self._structs
        passes, (own, residuals) = self.programs.chunks[chunk], of_chunks[chunk]
        forward = *own, passes.x, passes.batch, numbers, told[chunk]
        backward = *own, residuals, _dh(passes)
        if letter == "F":
            return passes.F.lower(*forward, passes.added_to(sums, "F"))
        if letter == "FB":
            other = self.programs.chunks[1 - chunk]
            own, residuals = of_chunks[1 - chunk]
            both = passes.added_to(sums, "F") | other.added_to(sums, "B")
            return passes.FB(other).lower(*forward, *own, residuals, _dh(other), both)
        if letter == "W":
            _, _, tape, _ = jax.eval_shape(passes.b, *backward, passes.added_to(sums, "b"))
            return passes.W.lower(tape, passes.added_to(sums, "W"))
        return getattr(passes, letter).lower(*backward, passes.added_to(sums, letter))


def _dh(passes: Any) -> Any:
    return None if passes.stage.is_last else passes.message


def compiling() -> ThreadPoolExecutor:
    """Threads to compile in: a program takes one core."""
    return ThreadPoolExecutor(os.cpu_count() or 1, "compile")
