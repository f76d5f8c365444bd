"""An engine whose programs are counted and timed: tokens a second, drafts that were accepted."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generate import Clock
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.step import Chunk
from dsv3_jax.inference.weights import Weights


@dataclass
class Tally(Clock):
    """Of all rows together; `decoding` is of steps, `prefill` of chunks of prompts."""

    drafts: int = 0
    """Made for each step"""
    read: int = 0
    """Tokens of prompts; those of beginnings that texts share count once"""
    steps: int = 0
    """Each counts once for every row that took part"""

    @property
    def accepted(self) -> float | None:
        """Drafts of a step that were accepted, on the average; None where there are none."""
        return self.decoded / self.steps - 1 if self.drafts and self.steps else None


class _Counted(Programs):
    """Programs that say what they did."""

    def __init__(self, programs: Programs, tally: Tally) -> None:
        super().__init__(programs.experts, programs.mesh, programs.top)
        self._tally = tally

    def read(self, weights: Any, state: Any, chunks: Sequence[Chunk], *rest: Any) -> Any:
        with self._timed("prefill"):
            done = jax.block_until_ready(super().read(weights, state, chunks, *rest))
        self._tally.read += sum(int(chunk.count_B.sum()) for chunk in chunks)
        return done

    def go_on(self, *args: Any) -> Any:
        with self._timed("decoding"):
            state, verdict = jax.block_until_ready(super().go_on(*args))
        count = args[-1]
        taken_NB = np.asarray(verdict.taken_B)[:count]
        self._tally.decoded += int(taken_NB.sum())
        self._tally.steps += int((taken_NB > 0).sum())
        return state, verdict

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Without the compilation that may be part of it."""
        begun, compiling = time.perf_counter(), self._tally.compiling
        yield
        seconds = time.perf_counter() - begun - (self._tally.compiling - compiling)
        setattr(self._tally, what, getattr(self._tally, what) + seconds)

    def _compile(self, *args: Any) -> Any:
        with self._tally.measured("compiling"):
            return super()._compile(*args)


def counted_engine(
    weights: Weights, settings: EngineConfig, mesh: Mesh | None = None
) -> tuple[Engine, Tally]:
    """An engine, and what is kept of its work. The errors of `Engine`."""
    engine, tally = Engine(weights, settings, mesh), Tally(drafts=settings.drafts)
    engine.programs = _Counted(engine.programs, tally)
    return engine, tally
