"""Stages of shared memory that one warpgroup fills with copies of operands and others read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclass(frozen=True)
class Part:
    """What a stage holds of an operand."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    transforms: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Ring:
    """Blocks are counted from 0 on through all that is ever copied; a block's stage is free again
    when all readers have released it.
    """

    def __init__(self, refs: Sequence[Any], come: Any, used: Any) -> None:
        self._refs, self._come, self._used = refs, come, used
        self.stages = used.shape[0]

    @staticmethod
    def allocations(parts: Sequence[Part], stages: int, readers: int) -> dict[str, Any]:
        """What `pl.run_scoped` is to allocate for the three arguments."""
        return {
            "refs": [
                plgpu.SMEM((stages, *part.shape), part.dtype, transforms=part.transforms)
                for part in parts
            ],
            "come": plgpu.Barrier(num_arrivals=len(parts), num_barriers=stages),
            "used": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        }

    def fill(self, count: jax.Array, sources: Sequence[Any]) -> None:
        """Begins to copy a block, as soon as its stage is free."""
        stage = self._stage(count)
        pl.when(count >= self.stages)(partial(plgpu.barrier_wait, self._used.at[stage]))
        for source, target in zip(sources, self._refs, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[stage], self._come.at[stage])

    def drain(self, count: jax.Array) -> None:
        """Behind so many blocks: waits for all readers, so that no barrier is left behind."""
        for stage in range(self.stages):
            pl.when(count > stage)(partial(plgpu.barrier_wait, self._used.at[stage]))

    def wait(self, count: jax.Array) -> None:
        """Until a block has come. Once for each, in their order."""
        plgpu.barrier_wait(self._come.at[self._stage(count)])

    def block(self, count: jax.Array) -> list[Any]:
        return [ref.at[self._stage(count)] for ref in self._refs]

    def release(self, count: jax.Array) -> None:
        plgpu.barrier_arrive(self._used.at[self._stage(count)])

    def _stage(self, count: jax.Array) -> jax.Array:
        return lax.rem(count, self.stages)
