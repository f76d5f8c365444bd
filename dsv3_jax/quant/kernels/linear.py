"""The three products of a linear in FP8 by kernels, of what `fp8_gemm` has at hand (report 3.3.2).

    Fprop   Y  = X W       X quantised in tiles 1x128, SwiGLU in the same pass
    Dgrad   dX = dY W^T    dY quantised in one pass in tiles 1x128, and in
    Wgrad   dW = X^T dY    tiles 128x1, transposed; X from what was kept

Tensor cores want the inner dimension of both operands of E4M3 last. Dgrad finds weights so; for
Fprop they are transposed, which moves two bytes a weight where the product reads one.

Where XLA's BF16 product was faster, Fprop and Dgrad take it instead (`quant.kernels` auto), of what
the same E4M3 and scales stand for, rounded to bfloat16.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.quant.expert_rows import side_by_side
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.kept import Kept, keep, kept_as
from dsv3_jax.quant.kernels.quantize import quantize_both, quantize_columns, quantize_rows, retile
from dsv3_jax.quant.kernels.rows_gemm import multiply_rows
from dsv3_jax.quant.kernels.swiglu import swiglu_columns, swiglu_rows
from dsv3_jax.quant.kernels.walk import BLOCK
from dsv3_jax.quant.kernels.wgrad_gemm import multiply_columns
from dsv3_jax.quant.recipes import COLUMN, ROW, SQUARE, Operand, Rule
from dsv3_jax.quant.swiglu import swiglu

# Of dense linears: up to these sizes XLA's product of BF16 was faster on an H200, 219 us beside 289
# with an inner size of 512, and 35 beside 54 with 128 rows, not counting what it takes to make BF16
# of FP8 (docs/decisions.md).
SHORT_INNER, FEW_ROWS = 512, 128


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
    y_XF = _product(rule, *rows, w_EFD, expert_x, source.dtype)
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
    dx_XD = _product(rule, *rows, _side_by_side(weights), expert_x, dtype)
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
    tokens = dy.values.shape[1]
    if expert_x is None:
        count_E = jnp.full(1, tokens // BLOCK, jnp.int32)
    else:
        count_E = jnp.bincount(expert_x, length=experts) * (tokens // expert_x.size // BLOCK)
    first_E = jnp.cumsum(count_E) - count_E
    dw = multiply_columns(*x, *dy, first_E.astype(jnp.int32), count_E.astype(jnp.int32))
    dw = dw[..., :width]
    return dw[0] if expert_x is None else dw


def multiply_in_bf16(
    a_TK: jax.Array, s_kT: jax.Array, w_NK: Blocked, dtype: jnp.dtype
) -> jax.Array:
    """`multiply_rows` of one expert by XLA, of operands rounded to bfloat16."""
    # XLA's products on GPUs sum bfloat16 in float32, whatever they return. To return that would
    # take more than what BF16 is to gain: 537 MB of 4096 x 32768.
    x_TK = Blocked(a_TK, s_kT.T, ROW).dequantize(jnp.bfloat16)
    w_NK = w_NK.dequantize(jnp.bfloat16)
    return jnp.einsum("tk,nk->tn", x_TK, w_NK, preferred_element_type=dtype)


def _product(
    rule: Rule,
    a_TK: jax.Array,
    s_kT: jax.Array,
    w_ENK: Blocked,
    expert_x: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Rows in tiles 1x128 times the transpose of each block's expert's weight -> [T, N]."""
    tokens, inner = a_TK.shape
    if expert_x is not None:
        experts = expert_x
    elif rule.kernels == "auto" and (inner <= SHORT_INNER or tokens <= FEW_ROWS):
        return multiply_in_bf16(a_TK, s_kT, w_ENK[0], dtype)
    else:
        experts = jnp.zeros(1, jnp.int32)  # all rows are of the one
    return multiply_rows(a_TK, s_kT, w_ENK.values, w_ENK.scales, experts, dtype)


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
