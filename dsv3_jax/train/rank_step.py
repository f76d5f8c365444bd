"""A pipeline rank in the midst of a step: its programs with what they take and add to."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from dsv3_jax.data.loader import Batch
from dsv3_jax.parallel.orders import Work
from dsv3_jax.train.pipeline_programs import PassPrograms
from dsv3_jax.train.rank_programs import RankPrograms
from dsv3_jax.train.stage import Arrays, Numbers
from dsv3_jax.train.stage_programs import Told


@dataclass
class RankStep:
    """The executor's view of it: `parallel.pipeline.Rank`."""

    programs: RankPrograms
    kinds: PassPrograms
    weights: dict[int, Arrays]
    """Of each chunk, by name"""
    biases: dict[int, nnx.State]
    microbatches: list[Batch]
    numbers: Numbers
    sums: Arrays
    told: dict[int, Told]
    row_is_finite: dict[int, jax.Array]

    def forward(self, work: Work, x: Any) -> tuple[Any, Any]:
        chunk = work.chunk
        program, sums = self.kinds["F", chunk], self._sums("F", chunk)
        h, residuals, self.told[chunk], sums = program(
            *self._inputs(work, x), self.told[chunk], sums
        )
        self.sums |= sums
        return h, residuals

    def backward(self, work: Work, residuals: Any, dh: Any) -> Any:
        if ("B", work.chunk) not in self.kinds:
            dx, tape = self.input_gradients(work, residuals, dh)
            self.weight_gradients(work, tape)
            return dx
        program, sums = self.kinds["B", work.chunk], self._sums("B", work.chunk)
        dx, finite, sums = program(*self._of(work), residuals, dh, sums)
        return self._after(work, dx, finite, sums)

    def input_gradients(self, work: Work, residuals: Any, dh: Any) -> tuple[Any, Any]:
        program, sums = self.kinds["b", work.chunk], self._sums("b", work.chunk)
        dx, finite, tape, sums = program(*self._of(work), residuals, dh, sums)
        return self._after(work, dx, finite, sums), tape

    def weight_gradients(self, work: Work, tape: Any) -> None:
        self.sums |= self.kinds["W", work.chunk](tape, self._sums("W", work.chunk))

    def forward_and_backward(
        self, forward: Work, x: Any, backward: Work, residuals: Any, dh: Any
    ) -> tuple[Any, Any, Any]:
        chunk = forward.chunk
        sums = self._sums("F", chunk) | self._sums("B", backward.chunk)
        h, kept, self.told[chunk], dx, finite, sums = self.kinds["FB", chunk](
            *self._inputs(forward, x),
            self.told[chunk],
            *self._of(backward),
            residuals,
            dh,
            sums,
        )
        return h, kept, self._after(backward, dx, finite, sums)

    def _of(self, work: Work) -> tuple[Arrays, nnx.State]:
        return self.weights[work.chunk], self.biases[work.chunk]

    def _inputs(self, work: Work, x: Any) -> tuple:
        return *self._of(work), x, self.microbatches[work.microbatch], self.numbers

    def _sums(self, kind: str, chunk: int) -> Arrays:
        return self.programs.chunks[chunk].added_to(self.sums, kind)

    def _after(self, work: Work, dx: Any, finite: Any, sums: Arrays) -> Any:
        self.sums |= sums
        if finite is not None:
            self.row_is_finite[work.microbatch] = finite
        return dx
