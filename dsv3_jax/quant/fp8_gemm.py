"""The derivative rule of linears in low precision (report 3.3.2, 3.3.3, 3.5.2).

Operands are rounded block by block as the weight's rule says, expanded to float32 and multiplied
there: exact within float32's rounding. That is the definition, which `kernels/linear.py` comes near
to on Hopper GPUs. `accumulator.py` emulates what tensor cores make of a sum.

    Fprop   Y  = X W       X in tiles 1x128            W in 128x128
    Dgrad   dX = dY W^T    dY in tiles 1x128           the same W, transposed
    Wgrad   dW = X^T dY    X and dY in tiles 128x1, X from what the forward pass kept

For the backward pass the forward pass keeps its input in FP8 (after attention in E5M6, 12 bits
packed), or, behind SwiGLU, SwiGLU's arguments. Weights are arguments: no second copy is kept. A
Wgrad that is put off finds dY in its tiles, half of what it takes in bfloat16.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.quant import tape
from dsv3_jax.quant.expert_rows import by_group, side_by_side, sum_by_expert
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.kept import Kept, keep
from dsv3_jax.quant.recipes import Rule
from dsv3_jax.quant.trained_weight import Measure, TrainedWeight

Activation = Callable[[jax.Array, jax.Array | None], jax.Array]

# Names of what linears keep, for policies of recomputation and for whoever counts bytes.
INPUT, ACTIVATION_INPUT = "linear_input", "ffn_gate_up"


class _Static(NamedTuple):
    """What does not depend on numbers."""

    rule: Rule
    activation: Activation | None
    measure: Measure | None
    by_kernels: bool
    """Made by `quant.kernels.linear`, not here"""


class _Arrays(NamedTuple):
    """The arguments that no gradient goes to."""

    expert_x: jax.Array | None
    blocked: tuple[Blocked, ...]


def fp8_linear(
    source: jax.Array,
    weights: Sequence[TrainedWeight],
    activation: Activation | None = None,
    gate_X1: jax.Array | None = None,
    expert_x: jax.Array | None = None,
) -> jax.Array:
    """Rows X [X, D] times weights [D, F] side by side, or in blocks times their experts' [E, D, F].

    X is `source`, or `activation(source, gate)` of a source of any width. Arguments as of
    `gemm.grouped_linear`. -> [X, F + ...] in the dtype of `source`.
    """
    first = weights[0]
    assert all(w.rule == first.rule for w in weights), "weights side by side have one rule"
    measure = first.taps and first.taps.measure
    arrays = _Arrays(expert_x, tuple(w.value for w in weights))
    sizes = _sizes(source, arrays)
    by_kernels = first.rule.by_kernels and _kernels().fits(first.rule, *sizes)
    static = _Static(first.rule, activation, measure, by_kernels)
    slots, taps = (tuple(getattr(w, name) for w in weights) for name in ("slot", "taps"))
    return _fp8_linear(static, source, gate_X1, slots, taps, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_linear(static, source, gate_X1, slots, taps, arrays):
    return _forward(static, source, gate_X1, slots, taps, arrays)[0]


def _forward(static, source, gate_X1, slots, taps, arrays):
    rule = static.rule
    name = ACTIVATION_INPUT if static.activation else INPUT
    if static.by_kernels:
        operands = source, gate_X1, arrays.blocked, arrays.expert_x
        y_XF, kept = _kernels().forward(rule, static.activation, *operands)
        kept = checkpoint_name(kept, name)
    else:
        kept = checkpoint_name(keep(source, rule.kept), name)
        x_xMD = by_group(_input(static, source, gate_X1), arrays.expert_x)
        y_xMF = _einsum("xmd,xdf->xmf", rule.input.fake_quantize(x_xMD), _weights(arrays))
        y_XF = y_xMF.reshape(-1, y_xMF.shape[-1]).astype(source.dtype)
    found = None
    if static.measure:
        x_xMD = by_group(_input(static, source, gate_X1), arrays.expert_x)
        found = static.measure(x_xMD, rule.input)
    if tape.is_put_off(slots):
        left = jax.eval_shape(partial(_left, static, arrays), y_XF)  # dY has Y's shape
        operands = kept, gate_X1, left, arrays.expert_x
        tape.note(slots, _widths(arrays), _gradient_of(static, arrays), operands)
    return y_XF, (kept, gate_X1, found, tape.hollow(slots), taps, arrays)


def _backward(static, residuals, dy_XF):
    kept, gate_X1, found, slots, taps, arrays = residuals
    rule = static.rule
    x_XD, pull = jax.vjp(partial(_input, static), kept.dequantize(), gate_X1)
    dy_xMF = by_group(dy_XF, arrays.expert_x)
    if static.by_kernels:
        dtype = x_XD.dtype if static.activation else dy_XF.dtype
        operands = dy_XF, arrays.blocked, arrays.expert_x
        dx_XD, dy = _kernels().input_gradient(rule, *operands, dtype)
        dx_XD = dx_XD.astype(x_XD.dtype)
    else:
        dy_rounded_xMF = rule.grad_output.fake_quantize(dy_xMF)
        dx_XD = _einsum("xmf,xdf->xmd", dy_rounded_xMF, _weights(arrays)).reshape(x_XD.shape)
        dy = _left(static, arrays, dy_XF) if tape.is_put_off(slots) else dy_xMF
    dsource, dgate_X1 = pull(dx_XD)
    if static.measure:  # weights side by side share their input and their output's gradient
        measured = found, static.measure(dy_xMF, rule.grad_output)
        taps = tuple(jax.tree.unflatten(jax.tree.structure(tap), measured) for tap in taps)
    operands = kept, gate_X1, dy, arrays.expert_x
    dslots = tape.cotangents(slots, _widths(arrays), _gradient_of(static, arrays), operands)
    return dsource.astype(dy_XF.dtype), dgate_X1, dslots, taps, None


_fp8_linear.defvjp(_forward, _backward)


def _input(static: _Static, source: jax.Array, gate_X1: jax.Array | None) -> jax.Array:
    return static.activation(source, gate_X1) if static.activation else source


def _kernels() -> Any:
    """Imported when they are wanted: Pallas' GPU part takes time, and old versions differ."""
    from dsv3_jax.quant.kernels import linear

    return linear


def _sizes(source: jax.Array, arrays: _Arrays) -> tuple[int, int, int, tuple[int, ...]]:
    """Rows, their blocks, the inner size, and the weights' widths."""
    blocks = 1 if arrays.expert_x is None else arrays.expert_x.size
    return len(source), blocks, arrays.blocked[0].shape[-2], _widths(arrays)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """In full float32: accelerators would take less by default, and scales have 24 bits."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)


def _weights(arrays: _Arrays) -> jax.Array:
    """[x, D, F + ...], float32: what each block of rows is multiplied with."""
    w = side_by_side([w.dequantize() for w in arrays.blocked])
    return w[None] if arrays.expert_x is None else w[arrays.expert_x]


def _widths(arrays: _Arrays) -> tuple[int, ...]:
    return tuple(w.shape[-1] for w in arrays.blocked)


def _left(static: _Static, arrays: _Arrays, dy_XF: jax.Array) -> Any:
    """dY as Wgrad rounds it: what that is put off with."""
    if static.by_kernels:
        operands = dy_XF, arrays.blocked, arrays.expert_x
        return _kernels().input_gradient(static.rule, *operands, dy_XF.dtype)[1]
    operand = static.rule.wgrad_grad_output
    return keep(operand.matrices(by_group(dy_XF, arrays.expert_x)), operand)


def _gradient_of(static: _Static, arrays: _Arrays) -> Callable[..., jax.Array]:
    experts = 1 if arrays.expert_x is None else arrays.blocked[0].shape[0]
    if static.by_kernels:
        sizes = {"experts": experts, "width": sum(_widths(arrays))}
        return partial(_kernels().weight_gradient, static.rule, static.activation, **sizes)
    return partial(_wgrad, static, num_experts=experts)


def _wgrad(
    static: _Static,
    kept: Kept,
    gate_X1: jax.Array | None,
    dy: jax.Array | Kept,
    expert_x: jax.Array | None,
    num_experts: int,
) -> jax.Array:
    """The gradient of the weights side by side, summed over an expert's blocks of rows; of
    dY [x, M, F], or of what `_left` has made of it.
    """
    rule = static.rule
    x_xMD = by_group(_input(static, kept.dequantize(), gate_X1), expert_x)
    if isinstance(dy, Kept):
        dy_xMF = dy.dequantize().reshape(*x_xMD.shape[:2], -1)
    else:
        dy_xMF = rule.wgrad_grad_output.fake_quantize(dy)
    dw_xDF = _einsum("xmd,xmf->xdf", rule.wgrad_input.fake_quantize(x_xMD), dy_xMF)
    return dw_xDF[0] if expert_x is None else sum_by_expert(dw_xDF, expert_x, num_experts)
