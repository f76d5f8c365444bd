"""How the GEMM kernels share out their work: blocks of the grid that stay and walk over tiles of
the output, two warpgroups that multiply and one that copies.

A block of the grid is resident on each multiprocessor. A tile has 128 rows and 128 columns, of
which each multiplying warpgroup has 64 rows: 64 float32 registers a thread for a block's products,
and 64 for their sum. One warpgroup's promotion (64 or 128 operations a thread) hides behind the
other's products (4 instructions of `wgmma`). Stages of the copies fill the shared memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.kernels.tiles import BLOCK, E4M3, launched, swizzled

WARPGROUPS = 2
ROWS = BLOCK // WARPGROUPS  # of one warpgroup: those of one `wgmma`
OPERAND = swizzled(E4M3)
_SHARED_BYTES = 227 * 1024
_COPIER_REGISTERS = 40
_ANY_NUMBER = 1 << 20  # of blocks: the copies' shared memory is the same for all from `stages` on


@dataclass(frozen=True)
class Walk:
    """What was chosen by timing (benchmarks/README.md)."""

    width: int
    """Rows of tiles that are walked together, so that their operands stay in the L2"""
    stages: int = 4
    """At most so many blocks' operands in shared memory"""
    multiprocessors: int | None = None
    """That have a block of the grid; None: all of the device's"""


class Sums:
    """A tile's sums, made step by step from copies of operands that stay ahead of it.

    `step(index, *operands, sum)` is called for every block of the inner size and gives the sum with
    that block in it.
    """

    def __init__(self, walk: Walk, specs: Sequence[plgpu.BlockSpec], dtype: jnp.dtype) -> None:
        self.specs, self.dtype = specs, jnp.dtype(dtype)
        operands = sum(BLOCK * (BLOCK if len(spec.transforms) else 4) for spec in specs)
        left = _SHARED_BYTES - BLOCK * BLOCK * self.dtype.itemsize - 1024
        self.stages = min(walk.stages, left // operands)

    def allocations(self, *operands: Any) -> dict[str, Any]:
        """What `pl.run_scoped` is to allocate, for operands of these shapes."""
        return {
            "copies": self._pipeline(_nothing, _nothing, _ANY_NUMBER).get_allocations(*operands),
            "tile": plgpu.SMEM(
                (WARPGROUPS, ROWS, BLOCK), self.dtype, transforms=swizzled(self.dtype)
            ),
        }

    def write(
        self,
        step: Callable[..., jax.Array],
        blocks: int | jax.Array,
        operands: Sequence[Any],
        out: Any,
        copies: Any,
        tile: Any,
    ) -> None:
        """The sum over so many blocks of the operands' tiles, to a tile of the output."""
        own, own_rows = warpgroup()

        def context(run: Callable[[jax.Array], jax.Array]) -> None:
            zeros = jnp.zeros((ROWS, BLOCK), jnp.float32)
            total = run(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
            tile[own] = total.astype(self.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile.at[own], out.at[own_rows])

        self._pipeline(step, context, blocks)(*operands, allocations=copies)

    def _pipeline(self, step: Callable, context: Callable, blocks: int | jax.Array) -> Callable:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(blocks,),
            memory_registers=_COPIER_REGISTERS,
            in_specs=self.specs,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=self.stages,
            compute_context=context,
        )


def _nothing(*_: Any, **__: Any) -> None:
    """A step or context of a pipeline of which only the allocations are asked for."""


def warpgroup() -> tuple[jax.Array, Any]:
    """This one's place, and its rows of a tile."""
    own = lax.axis_index("warpgroup")
    return own, pl.ds(own * ROWS, ROWS)


def products(a: Any, b: Any, scaling: Callable[[], Callable[[jax.Array], jax.Array]]) -> jax.Array:
    """A block's products by the tensor cores, a [64, 128] times the transpose of b [128, 128],
    scaled. `scaling` fetches the scales while they multiply, and gives what scales the products.
    """

    def with_sums(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, b.transpose((1, 0)))
        scaled = scaling()
        return scaled(sums[...])

    return pl.run_scoped(with_sums, plgpu.ACC((ROWS, BLOCK), jnp.float32))


def place(index: jax.Array, tiles: tuple[int, int], walk: Walk) -> tuple[jax.Array, jax.Array]:
    """Row and column of the tile that comes at this place of the walk over rows x columns tiles."""
    return plgpu.planar_snake(index, tiles, 0, walk.width)


def walked(
    body: Callable, arrays: Sequence[jax.Array], out: jax.ShapeDtypeStruct, walk: Walk
) -> jax.Array:
    """What a kernel `body(*inputs, output)` of resident blocks writes."""
    (y,) = launched(
        body,
        arrays,
        [out],
        grid=(walk.multiprocessors or _multiprocessors(),),
        grid_names=("resident",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
    )
    return y


def _multiprocessors() -> int:
    """The device's; where kernels are lowered without one, those of an H100 or H200 (SXM)."""
    return getattr(jax.local_devices()[0], "core_count", 132)
