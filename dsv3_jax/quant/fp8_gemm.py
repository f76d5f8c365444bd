"""The derivative rule of linears in low precision (report 3.3.2, 3.3.3, 3.5.2).

Operands are rounded block by block as the weight's rule says and multiplied in float32: products of
two E4M3 numbers are exact there, and so is the sum within float32's rounding. `accumulator.py`
emulates what tensor cores make of it.

    Fprop   Y  = X W       X in tiles 1x128            W in 128x128
    Dgrad   dX = dY W^T    dY in tiles 1x128           the same W, transposed
    Wgrad   dW = X^T dY    X and dY in tiles 128x1, X from what the forward pass kept

For the backward pass the forward pass keeps its input in FP8 (after attention in E5M6, 12 bits
packed), or, behind SwiGLU, SwiGLU's arguments. Weights are arguments: no second copy is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.kept import keep
from dsv3_jax.quant.recipes import Rule
from dsv3_jax.quant.trained_weight import Measure, TrainedWeight

Through = Callable[[jax.Array, jax.Array | None], jax.Array]


class _Static(NamedTuple):
    """What does not depend on numbers."""

    rule: Rule
    through: Through | None
    measure: Measure | None
    dtypes: tuple[jnp.dtype, ...]
    """Of the weights' gradients"""


class _Arrays(NamedTuple):
    """The arguments that no gradient goes to."""

    expert_x: jax.Array | None
    live_X: jax.Array | None
    blocked: tuple[Blocked, ...]


def fp8_linear(
    source: jax.Array,
    weights: Sequence[TrainedWeight],
    through: Through | None = None,
    factor: jax.Array | None = None,
    expert_x: jax.Array | None = None,
    live_X: jax.Array | None = None,
) -> jax.Array:
    """Rows [X, D] times weights [D, F] side by side, or in blocks times their experts' [E, D, F].

    Arguments as of `gemm.grouped_linear`. -> [X, F + ...] in the dtype of `source`.
    """
    first = weights[0]
    static = _Static(first.rule, through, first.measure, tuple(w.slot.dtype for w in weights))
    arrays = _Arrays(expert_x, live_X, tuple(w.blocked for w in weights))
    slots, taps = (tuple(getattr(w, name) for w in weights) for name in ("slot", "taps"))
    return _fp8_linear(static, source, factor, slots, taps, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_linear(static, source, factor, slots, taps, arrays):
    return _forward(static, source, factor, slots, taps, arrays)[0]


def _forward(static, source, factor, slots, taps, arrays):
    del slots, taps
    rule, source = static.rule, only_live(source, arrays.live_X)
    x_XD = static.through(source, factor) if static.through else source
    name = "ffn_gate_up" if static.through else "linear_input"
    kept = checkpoint_name(keep(source if static.through else x_XD, rule.kept), name)
    x_xMD = rule.input.rounded(_by_group(x_XD, arrays.expert_x))
    y_xMF = jnp.einsum("xmd,xdf->xmf", x_xMD, _weights(arrays))
    found = static.measure(x_XD, rule.input) if static.measure else None
    y_XF = y_xMF.reshape(-1, y_xMF.shape[-1]).astype(source.dtype)
    return y_XF, (kept, factor, found, arrays)


def _backward(static, residuals, dy_XF):
    kept, factor, found, arrays = residuals
    rule, dtype, dy_XF = static.rule, dy_XF.dtype, only_live(dy_XF, arrays.live_X)
    source = kept.values()
    x_XD, pull = source, None
    if static.through:
        x_XD, pull = jax.vjp(static.through, source, factor)
    x_xMD, dy_xMF = (_by_group(rows, arrays.expert_x) for rows in (x_XD, dy_XF))
    dx_xMD = jnp.einsum("xmf,xdf->xmd", rule.gradient.rounded(dy_xMF), _weights(arrays))
    dw_xDF = jnp.einsum(
        "xmd,xmf->xdf", rule.wgrad_input.rounded(x_xMD), rule.wgrad_gradient.rounded(dy_xMF)
    )
    dsource, dfactor = dx_xMD.reshape(x_XD.shape), None
    if pull:
        dsource, dfactor = pull(dsource)
    # Weights side by side share their input and the gradient of their output.
    measured = static.measure and (found, static.measure(dy_XF, rule.gradient))
    dtaps = (measured,) * len(arrays.blocked)
    dslots = _parted(_sum_by_expert(dw_xDF, arrays), arrays.blocked, static.dtypes)
    return dsource.astype(dtype), dfactor, dslots, dtaps, None


_fp8_linear.defvjp(_forward, _backward)


def only_live(x_XD: jax.Array, live_X: jax.Array | None) -> jax.Array:
    """Other rows as zeros. Chosen, not multiplied: NaN in a dead row is nobody's NaN."""
    return x_XD if live_X is None else jnp.where(live_X[:, None], x_XD, 0)


def _by_group(x_XD: jax.Array, expert_x: jax.Array | None) -> jax.Array:
    """[x, M, D]: rows of each expert's block; one block of all rows without experts."""
    groups = 1 if expert_x is None else expert_x.size
    return x_XD.reshape(groups, -1, x_XD.shape[-1])


def _weights(arrays: _Arrays) -> jax.Array:
    """[x, D, F + ...], float32: what each block of rows is multiplied with."""
    wide = [w.dequantize() for w in arrays.blocked]
    w_DF = wide[0] if len(wide) == 1 else jnp.concatenate(wide, -1)
    return w_DF[None] if arrays.expert_x is None else w_DF[arrays.expert_x]


def _sum_by_expert(dw_xDF: jax.Array, arrays: _Arrays) -> jax.Array:
    """[E, D, F], or [D, F] without experts. A product, as in `gemm`."""
    if arrays.expert_x is None:
        return dw_xDF[0]
    onehot_xE = jax.nn.one_hot(arrays.expert_x, arrays.blocked[0].shape[0], dtype=dw_xDF.dtype)
    return jnp.einsum("xe,xdf->edf", onehot_xE, dw_xDF)


def _parted(
    dw: jax.Array, blocked: Sequence[Blocked], dtypes: Sequence[jnp.dtype]
) -> tuple[jax.Array, ...]:
    """The gradient of weights side by side, for each in its own dtype."""
    parts, start = [], 0
    for w, dtype in zip(blocked, dtypes, strict=True):
        parts.append(dw[..., start : start + w.shape[-1]].astype(dtype))
        start += w.shape[-1]
    return tuple(parts)
