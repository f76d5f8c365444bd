"""Quantisation of weights in blocks of 128x128, in one pass over memory (report 3.3.2).

XLA makes five passes of it, one of them over a transposed copy in float32 (docs/decisions.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.fp8 import Blocked, Scale
from dsv3_jax.quant.kernels.quantize import SQUARE, STRIPS, grid
from dsv3_jax.quant.kernels.tiles import (
    BLOCK,
    E4M3,
    STRIP,
    Operand,
    along_columns,
    finite_maxima,
    over_scales,
    over_tiles,
    scales_of,
)


def fits(w: jax.Array) -> bool:
    """Whether a weight can be quantised here."""
    return (
        w.ndim >= 2
        and w.dtype in (jnp.float32, jnp.bfloat16)
        and all(size % BLOCK == 0 for size in w.shape[-2:])
        and w.size > 0
    )


@partial(jax.jit, static_argnames="scale")
def quantize_weight(w: jax.Array, scale: Scale) -> Blocked:
    """w bfloat16 or float32 [..., D, F] -> `fp8.quantize` in blocks of 128x128 of E4M3."""
    w_XF = w.reshape(-1, w.shape[-1])
    shape = w_XF.shape

    def step(w_XF, q_XF, s_F, maxima_X):
        strips = [plgpu.load(w_XF.at[strip], layout=plgpu.Layout.WGMMA_8BIT) for strip in STRIPS]
        for strip, w_SF in zip(STRIPS, strips, strict=True):
            maxima_X[strip] = finite_maxima(w_SF)
        plgpu.commit_smem()
        # Along columns, so that each row finds the largest of all rows.
        all_SX = along_columns(maxima_X[...], (STRIP, BLOCK))
        s_S = scales_of(all_SX.max(1), scale)
        for strip, w_SF in zip(STRIPS, strips, strict=True):
            q_XF[strip], s_F[strip] = over_scales(w_SF, s_S, scale), s_S

    # A block's scale as often as it has columns: the copy engine moves 16 bytes at least.
    scales = Operand((shape[0] // BLOCK, shape[1]), jnp.float32, (None, BLOCK))
    inputs, outputs = [Operand(shape, w.dtype, SQUARE)], [Operand(shape, E4M3, SQUARE), scales]
    scratch = [plgpu.SMEM((BLOCK,), jnp.float32)]
    q_XF, s_xF = over_tiles(step, [w_XF], inputs, outputs, grid(shape), scratch)
    s_xf = s_xF[:, ::BLOCK].reshape(*w.shape[:-2], w.shape[-2] // BLOCK, w.shape[-1] // BLOCK)
    return Blocked(q_XF.reshape(w.shape), s_xf)
