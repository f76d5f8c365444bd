"""The three products of a linear in FP8 by kernels, of what `fp8_gemm` has at hand (report 3.3.2).

    Fprop   Y  = X W       X quantised in tiles 1x128, SwiGLU in the same pass
    Dgrad   dX = dY W^T    dY quantised in one pass in tiles 1x128, and in
    Wgrad   dW = X^T dY    tiles 128x1, transposed; X from what was kept

Tensor cores want the inner dimension of both operands of E4M3 last. Dgrad finds weights so; for
Fprop they are transposed, which moves two bytes a weight where the product reads one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.quant.expert_rows import blocks_of_experts, side_by_side
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.kept import Kept, keep, kept_as
from dsv3_jax.quant.kernels.quantize import quantize_both, quantize_columns, quantize_rows, retile
from dsv3_jax.quant.kernels.rows_gemm import multiply_rows
from dsv3_jax.quant.kernels.swiglu import swiglu_columns, swiglu_rows
from dsv3_jax.quant.kernels.tiles import BLOCK
from dsv3_jax.quant.kernels.wgrad_gemm import multiply_columns
from dsv3_jax.quant.recipes import COLUMN, ROW, SQUARE, Operand, Rule
from dsv3_jax.quant.swiglu import swiglu


class Columns(NamedTuple):
    """An operand of Wgrad: E4M3 [D, T], scales float32 [T / 128, D]."""

    values: jax.Array
    scales: jax.Array


def fits(rule: Rule, rows: int, blocks: int, inner: int, widths: Sequence[int]) -> bool:
    """Whether kernels take a linear of so many rows, in so many blocks, with weights [inner, width]
    side by side.
    """
    tiles = {
        ROW: (rule.input, rule.grad_output),
        COLUMN: (rule.wgrad_input, rule.wgrad_grad_output),
        SQUARE: (rule.weight,),
    }
    return (
        all(x.fmt == "e4m3" and x.block == tile for tile, xs in tiles.items() for x in xs)
        and rows > 0
        and rows % (blocks * BLOCK) == inner % BLOCK == 0
        and all(width % BLOCK == 0 for width in widths[:-1])
    )


def forward(
    rule: Rule,
    activation: Callable | None,
    source: jax.Array,
    gate_X1: jax.Array | None,
    weights: Sequence[Blocked],
    expert_x: jax.Array | None,
) -> tuple[jax.Array, Kept]:
    """Y [X, F] in the dtype of `source`, and what the backward pass is to find."""
    if activation is swiglu and source.dtype == jnp.bfloat16:
        rows = swiglu_rows(source, gate_X1, rule.input.scale)
    else:
        x = activation(source, gate_X1) if activation else source
        rows = quantize_rows(x, rule.input.scale)
    if activation is None and rule.kept == rule.input:
        kept = _stored(rows, rule.kept, source.shape)
    else:
        kept = _keep(source, rule.kept)
    w = _side_by_side(weights)
    w_EFD = Blocked(*(jnp.swapaxes(part, -1, -2) for part in (w.values, w.scales)))
    y_XF = _product(*rows, w_EFD, expert_x, source.dtype)
    return y_XF[:, : sum(w.shape[-1] for w in weights)], kept


def input_gradient(
    rule: Rule,
    dy_XF: jax.Array,
    weights: Sequence[Blocked],
    expert_x: jax.Array | None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Columns]:
    """dX [X, D] in `dtype`, and dY as Wgrad takes it."""
    *rows, values, scales = quantize_both(
        _filled(dy_XF), rule.grad_output.scale, rule.wgrad_grad_output.scale
    )
    dx_XD = _product(*rows, _side_by_side(weights), expert_x, dtype)
    return dx_XD, Columns(values, scales)


def weight_gradient(
    rule: Rule,
    activation: Callable | None,
    kept: Kept,
    gate_X1: jax.Array | None,
    dy: Columns,
    expert_x: jax.Array | None,
    experts: int,
    width: int,
) -> jax.Array:
    """dW of all weights side by side, float32 [D, F], or of experts [E, D, F]."""
    scale = rule.wgrad_input.scale
    in_rows = kept.operand.block == ROW and kept.operand.fmt == "e4m3"
    if in_rows and activation is swiglu:
        x = swiglu_columns(kept.values, kept.float_scales.T, gate_X1, scale)
    elif in_rows and activation is None:
        x = retile(kept.values, kept.float_scales.T, scale)
    else:
        source = kept.dequantize()
        x = quantize_columns(activation(source, gate_X1) if activation else source, scale)
    owned = blocks_of_experts(_owners(expert_x), experts, dy.values.shape[1] // BLOCK)
    dw = multiply_columns(*x, *dy, *owned)[..., :width]
    return dw[0] if expert_x is None else dw


def _product(
    a_TK: jax.Array,
    s_kT: jax.Array,
    w_ENK: Blocked,
    expert_x: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Rows in tiles 1x128 times the transpose of each block's expert's weight -> [T, N]."""
    return multiply_rows(a_TK, s_kT, w_ENK.values, w_ENK.scales, _owners(expert_x), dtype)


def _owners(expert_x: jax.Array | None) -> jax.Array:
    """Experts of blocks of rows; without experts all rows are of the one."""
    return jnp.zeros(1, jnp.int32) if expert_x is None else expert_x


def _keep(source: jax.Array, operand: Operand) -> Kept:
    """`keep`, by a kernel where there is one."""
    if operand.block != ROW or operand.fmt != "e4m3":
        return keep(source, operand)
    return _stored(quantize_rows(source, operand.scale), operand, source.shape)


def _stored(rows: tuple[jax.Array, jax.Array], operand: Operand, shape: tuple[int, ...]) -> Kept:
    values, scales = rows
    return kept_as(operand, values, scales.T, shape)


def _side_by_side(weights: Sequence[Blocked]) -> Blocked:
    """One weight [E, D, F + ...], filled up with zeros to whole blocks; [1, D, F] without experts.

    All but the last have whole blocks (`fits`), so that joined they are blocks of the whole.
    """
    values = _filled(side_by_side([w.values for w in weights]))
    scales = side_by_side([w.scales for w in weights])
    if values.ndim == 2:
        values, scales = values[None], scales[None]
    return Blocked(values, scales)


def _filled(x: jax.Array) -> jax.Array:
    """Zeros to the next multiple of 128 in the last dimension."""
    missing = -x.shape[-1] % BLOCK
    if not missing:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
