"""Kernels over the tiles of matrices, and quantisation of what they hold in registers
(report 3.3.2).

A block of the grid is one warpgroup with one tile. It waits for the copy engine to bring that into
shared memory, computes there, and sends tiles of the outputs away with the copy engine again;
several blocks on a multiprocessor hide each other's waiting. Tiles lie swizzled in 128 bytes, so
that 8 rows are read or written at one column without conflict.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.formats import format_of
from dsv3_jax.quant.fp8 import Scale, scales_of_maxima

BLOCK = 128
"""Elements that share a scale"""
STRIP = 64
"""Rows that one warpgroup holds at a time"""
E4M3 = jnp.float8_e4m3fn

Place = tuple[Any, Any]


@dataclass(frozen=True)
class Operand:
    """A matrix, or a matrix of scales, by tiles."""

    shape: tuple[int, int]
    dtype: jnp.dtype
    tile: tuple[int | None, int]
    """None: one row, whose tile has one dimension"""
    place: Callable[[Any, Any], Place] = lambda i, j: (i, j)
    """Row and column of a step's tile -> those of this operand's tile"""

    @property
    def tile_shape(self) -> tuple[int, ...]:
        return tuple(size for size in self.tile if size is not None)

    @property
    def transforms(self) -> tuple[Any, ...]:
        return swizzled(self.dtype) if len(self.tile_shape) == 2 else ()

    def at(self, ref: Any, i: Any, j: Any) -> Any:
        """The part of `ref` that belongs to a step's tile."""
        places = zip(self.place(i, j), self.tile, strict=True)
        return ref.at[tuple(p if size is None else pl.ds(p * size, size) for p, size in places)]


def swizzled(dtype: jnp.dtype) -> tuple[Any, ...]:
    """Transforms of a matrix in shared memory."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def transposed(i: Any, j: Any) -> Place:
    return j, i


def launched(
    body: Callable[..., None],
    arrays: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    **launch: Any,
) -> list[jax.Array]:
    """What a kernel `body(*inputs, *outputs, *scratch)` writes.

    Outputs differ over the axes of a mesh that any input differs over. Under `vmap` it runs once
    after the other.
    """
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        **launch,
    )
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    return [_varying(y, axes) for y in sequential_vmap(kernel)(*arrays)]


def _varying(x: jax.Array, axes: Collection[str]) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def over_tiles(
    step: Callable[..., None],
    arrays: Sequence[jax.Array],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    grid: tuple[int, int],
    scratch: Sequence[Any] = (),
) -> list[jax.Array]:
    """Runs `step(*inputs, *outputs, *scratch)` on references to shared memory, once for each tile
    of the grid (rows of tiles, columns of tiles).
    """

    def body(*refs):
        sources, refs = refs[: len(inputs)], refs[len(inputs) :]
        targets, held = refs[: len(outputs)], refs[len(outputs) :]
        i, j = lax.div(lax.axis_index("tile"), grid[1]), lax.rem(lax.axis_index("tile"), grid[1])

        def one_tile(_, *loaded):
            step(*loaded, *held)
            plgpu.commit_smem()
            for output, tile_ref, target in zip(outputs, held, targets, strict=False):
                plgpu.copy_smem_to_gmem(tile_ref, output.at(target, i, j), commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        plgpu.emit_pipeline(
            one_tile,
            grid=(1,),
            in_specs=[
                plgpu.BlockSpec(x.tile, lambda _, x=x: x.place(i, j), transforms=x.transforms)
                for x in inputs
            ],
        )(*sources)
        plgpu.wait_smem_to_gmem(0)

    return launched(
        body,
        arrays,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        grid=(grid[0] * grid[1],),
        grid_names=("tile",),
        scratch_types=[
            *(plgpu.SMEM(x.tile_shape, x.dtype, transforms=x.transforms) for x in outputs),
            *scratch,
        ],
    )


def quantised(x_SL: jax.Array, scale: Scale) -> tuple[jax.Array, jax.Array]:
    """Rows in registers [S, 128] -> E4M3 [S, 128] and their scales [S], as `fp8.quantize` in blocks
    of 1x128. The sign of NaN is lost.
    """
    s_S = scales_of(finite_maxima(x_SL), scale)
    return over_scales(x_SL, s_S, scale), s_S


def scales_of(maxima_S: jax.Array, scale: Scale) -> jax.Array:
    """Scales of blocks with these largest magnitudes."""
    return scales_of_maxima(maxima_S, format_of("e4m3").largest, scale)


def over_scales(x_SL: jax.Array, s_S: jax.Array, scale: Scale) -> jax.Array:
    """Rows [S, 128] over their scales [S] -> E4M3 [S, 128]."""
    x_SL = x_SL.astype(jnp.float32)
    if scale == "pow2":
        # Exactly the quotient, without a division: 2^-e has the bits of exponent -e.
        inverse_S = lax.bitcast_convert_type((254 << 23) - _bits(s_S), jnp.float32)
    else:
        # As XLA's division on NVIDIA's GPUs, `div.full`, does it for scales, which are never
        # subnormal: the definition's numbers there. A division of each element would be the same
        # in four instructions instead of one.
        inverse_S = 1 / s_S
    quotient_SL = x_SL * along_rows(inverse_S, x_SL.shape)
    # The cast saturates, infinity as well; its product with 0 is NaN. Signs of 0 stay.
    return (quotient_SL + x_SL * 0).astype(E4M3)


def along_rows(x_S: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number for each row of registers of this shape."""
    return lax.broadcast_in_dim(x_S, shape, (0,))


def along_columns(x_L: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number for each column."""
    return lax.broadcast_in_dim(x_L, shape, (1,))


def finite_maxima(x_SL: jax.Array) -> jax.Array:
    """Largest finite magnitude in each row, float32 [S].

    Compared as integers, two of 16 bits in one instruction: raised so far that infinity becomes the
    smallest integer, what is not finite loses every comparison.
    """
    bits_SL = _bits(x_SL)
    integer = np.iinfo(bits_SL.dtype)
    infinity = np.array(np.inf, x_SL.dtype).view(integer.dtype)
    raised = np.array(integer.max - int(infinity) + 1, integer.dtype)
    bits_SL = (bits_SL & integer.max) + raised
    while bits_SL.shape[1] > 16:
        half = bits_SL.shape[1] // 2
        bits_SL = jnp.maximum(bits_SL[:, :half], bits_SL[:, half:])
    bits_SL = jnp.maximum(bits_SL, raised) - raised
    return lax.bitcast_convert_type(bits_SL, x_SL.dtype).astype(jnp.float32).max(1)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
