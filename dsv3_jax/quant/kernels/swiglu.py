"""SwiGLU fused with the quantisation of its output: what the down-projection multiplies with, and
what its Wgrad makes of the kept arguments (report 3.3.2, 3.3.3).

The output itself is never written. Up to the exponential function's last bits, of which each
compiler has its own, the results are `fp8.quantize` of `quant.swiglu.swiglu`. T and F are multiples
of 128.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.fp8 import Scale
from dsv3_jax.quant.kernels.quantize import (
    HALF,
    SQUARE,
    STRIPS,
    columns,
    grid,
    kept_strip,
    rows,
)
from dsv3_jax.quant.kernels.tiles import (
    BLOCK,
    Operand,
    along_columns,
    along_rows,
    over_tiles,
    quantised,
)


@partial(jax.jit, static_argnames="scale")
def swiglu_rows(
    gate_up_TF2: jax.Array,
    gate_T1: jax.Array | None,
    scale: Scale,
) -> tuple[jax.Array, jax.Array]:
    """silu(gate) * up * routing gate of bfloat16 [T, 2 F], rounded to bfloat16 and quantised in
    tiles 1x128 -> E4M3 [T, F], scales float32 [F / 128, T].
    """

    def step(gate_TF, up_TF, *refs):
        *factor_T, q_TF, s_T = refs
        for strip in STRIPS:
            gate_SF, up_SF = (
                plgpu.load(x_TF.at[strip], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)
                for x_TF in (gate_TF, up_TF)
            )
            h_SF = _silu(gate_SF) * up_SF
            for ref in factor_T:
                h_SF = h_SF * along_rows(ref[strip], h_SF.shape)
            q_TF[strip], s_T[strip] = quantised(h_SF.astype(gate_up_TF2.dtype), scale)

    shape = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    gate_up = Operand(gate_up_TF2.shape, gate_up_TF2.dtype, SQUARE)
    factors, factor = _factor(gate_T1)
    arrays = [gate_up_TF2, gate_up_TF2, *factors]
    inputs = [*_halves(gate_up, shape), *factor]
    return tuple(over_tiles(step, arrays, inputs, rows(shape), grid(shape)))


@partial(jax.jit, static_argnames="scale")
def swiglu_columns(
    q_TF2: jax.Array,
    s_fT: jax.Array,
    gate_T1: jax.Array | None,
    scale: Scale,
) -> tuple[jax.Array, jax.Array]:
    """The same of arguments kept in tiles 1x128, E4M3 [T, 2 F] and scales float32 [2 F / 128, T],
    in float32 -> tiles 128x1, transposed: E4M3 [F, T], scales float32 [T / 128, F].
    """

    def step(gate_TF, up_TF, s_gate_T, s_up_T, *refs):
        *factor_T, q_FT, s_F, half_TS = refs
        for strip in STRIPS:
            h_ST = _silu(kept_strip(gate_TF, s_gate_T, strip, half_TS))
            h_ST = h_ST * kept_strip(up_TF, s_up_T, strip, half_TS)
            for ref in factor_T:
                h_ST = h_ST * along_columns(ref[...], h_ST.shape)
            q_FT[strip], s_F[strip] = quantised(h_ST, scale)

    shape = q_TF2.shape[0], q_TF2.shape[1] // 2
    values, scales = rows(q_TF2.shape)
    factors, factor = _factor(gate_T1)
    arrays = [q_TF2, q_TF2, s_fT, s_fT, *factors]
    inputs = [*_halves(values, shape), *_halves(scales, shape), *factor]
    outputs, scratch = columns(shape), [HALF]
    return tuple(over_tiles(step, arrays, inputs, outputs, grid(shape), scratch))


def _halves(gate_up: Operand, shape: tuple[int, int]) -> list[Operand]:
    """Gate's tiles [T, F] and up's, which lie side by side in one array."""
    columns = grid(shape)[1]
    return [gate_up, replace(gate_up, place=lambda i, j: gate_up.place(i, j + columns))]


def _factor(gate_T1: jax.Array | None) -> tuple[list[jax.Array], list[Operand]]:
    """The routing gate, if there is one."""
    if gate_T1 is None:
        return [], []
    gate_1T = gate_T1.astype(jnp.float32).reshape(1, -1)
    return [gate_1T], [Operand(gate_1T.shape, jnp.float32, (None, BLOCK), lambda i, j: (0, i))]


def _silu(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1 + jnp.exp(-x))  # squared, five instructions less than a division
    return x * (root * root)
