"""Quantisation of activations and gradients in one pass over memory (report 3.3.2, 3.5.2).

Rows of a product have tiles of 1x128: values [T, D], scales float32 [D / 128, T], so that the
scales of 128 rows lie side by side. Operands of Wgrad have tiles of 128x1 and are transposed, since
tensor cores want the inner dimension of E4M3 last: values [D, T], scales [T / 128, D]. Values and
scales are those of `fp8.quantize`, bit for bit; only NaN may change its sign.

All sizes are multiples of 128.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.fp8 import Scale
from dsv3_jax.quant.kernels.tiles import (
    BLOCK,
    E4M3,
    STRIP,
    Operand,
    along_columns,
    over_tiles,
    quantised,
    swizzled,
    transposed,
)

SQUARE = BLOCK, BLOCK
STRIPS = tuple(slice(start, start + STRIP) for start in range(0, BLOCK, STRIP))
HALF = plgpu.SMEM((BLOCK, STRIP), jnp.float16, transforms=swizzled(jnp.float16))
"""A strip of columns, for `kept_strip`"""


@partial(jax.jit, static_argnames="scale")
def quantize_rows(x_TD: jax.Array, scale: Scale) -> tuple[jax.Array, jax.Array]:
    """x bfloat16 or float32 [T, D] -> E4M3 [T, D], scales float32 [D / 128, T]."""

    def step(x_TD, q_TD, s_T):
        _rows(x_TD, q_TD, s_T, scale)

    inputs = [Operand(x_TD.shape, x_TD.dtype, SQUARE)]
    return tuple(over_tiles(step, [x_TD], inputs, rows(x_TD.shape), grid(x_TD.shape)))


@partial(jax.jit, static_argnames=("row_scale", "column_scale"))
def quantize_both(
    x_TD: jax.Array, row_scale: Scale, column_scale: Scale
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x bfloat16 or float32 [T, D] -> `quantize_rows`' two, and of tiles 128x1 E4M3 [D, T] and
    scales float32 [T / 128, D]. x is read once.
    """

    def step(x_TD, q_TD, s_T, q_DT, s_D):
        _rows(x_TD, q_TD, s_T, row_scale)
        _columns(x_TD, q_DT, s_D, column_scale)

    shape = x_TD.shape
    inputs, outputs = [Operand(shape, x_TD.dtype, SQUARE)], [*rows(shape), *columns(shape)]
    return tuple(over_tiles(step, [x_TD], inputs, outputs, grid(shape)))


@partial(jax.jit, static_argnames="scale")
def quantize_columns(x_TD: jax.Array, scale: Scale) -> tuple[jax.Array, jax.Array]:
    """The last two of `quantize_both`, alone."""

    def step(x_TD, q_DT, s_D):
        _columns(x_TD, q_DT, s_D, scale)

    shape = x_TD.shape
    inputs = [Operand(shape, x_TD.dtype, SQUARE)]
    return tuple(over_tiles(step, [x_TD], inputs, columns(shape), grid(shape)))


@partial(jax.jit, static_argnames="scale")
def retile(q_TD: jax.Array, s_dT: jax.Array, scale: Scale) -> tuple[jax.Array, jax.Array]:
    """What `quantize_rows` made -> the same numbers in tiles 128x1, E4M3 [D, T] and scales float32
    [T / 128, D], as `fp8.retile`.
    """

    def step(q_TD, s_T, q_DT, s_D, half_TS):
        for strip in STRIPS:
            q_DT[strip], s_D[strip] = quantised(kept_strip(q_TD, s_T, strip, half_TS), scale)

    shape = q_TD.shape
    outputs = columns(shape)
    return tuple(over_tiles(step, [q_TD, s_dT], rows(shape), outputs, grid(shape), [HALF]))


def grid(shape: tuple[int, int]) -> tuple[int, int]:
    return shape[0] // BLOCK, shape[1] // BLOCK


def rows(shape: tuple[int, int]) -> list[Operand]:
    """Values and scales of a matrix [T, D] in tiles 1x128."""
    scales = shape[1] // BLOCK, shape[0]
    return [Operand(shape, E4M3, SQUARE), Operand(scales, jnp.float32, (None, BLOCK), transposed)]


def columns(shape: tuple[int, int]) -> list[Operand]:
    """Those of a matrix [T, D] in tiles 128x1, transposed."""
    scales = Operand((shape[0] // BLOCK, shape[1]), jnp.float32, (None, BLOCK))
    return [Operand(shape[::-1], E4M3, SQUARE, transposed), scales]


def _rows(x_TD, q_TD, s_T, scale: Scale) -> None:
    for strip in STRIPS:
        x_SD = plgpu.load(x_TD.at[strip], layout=plgpu.Layout.WGMMA_8BIT)
        q_TD[strip], s_T[strip] = quantised(x_SD, scale)


def _columns(x_TD, q_DT, s_D, scale: Scale) -> None:
    for strip in STRIPS:
        q_DT[strip], s_D[strip] = quantised(transposed_strip(x_TD, strip), scale)


def transposed_strip(x_TD, strip: slice) -> jax.Array:
    """Columns of a tile in shared memory as rows in registers, [S, T]."""
    x_ST = x_TD.at[:, strip].transpose((1, 0))
    if x_TD.dtype.itemsize == 2:  # which the instruction for loading matrices can transpose
        return plgpu.load(x_ST, layout=plgpu.Layout.WGMMA)
    loaded = plgpu.load(x_ST, layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(loaded, plgpu.Layout.WGMMA)


def kept_strip(q_TD, s_T, strip: slice, half_TS) -> jax.Array:
    """`Blocked.dequantize` of a strip of columns, as rows in registers, float32 [S, T].

    By way of float16, which holds E4M3 exactly: 16 bits can be transposed in loading, 8 cannot.
    """
    for rows in STRIPS:
        q_SD = plgpu.load(q_TD.at[rows], layout=plgpu.Layout.WGMMA_8BIT)
        half_TS[rows] = q_SD[:, strip].astype(jnp.float16)
    x_ST = transposed_strip(half_TS, slice(None)).astype(jnp.float32)
    return x_ST * along_columns(s_T[...], x_ST.shape)
