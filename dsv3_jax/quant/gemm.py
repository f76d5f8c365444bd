"""Matrix products with their derivative rules: the linear, and the grouped linear of the experts
(report 3.3).

Operands enter the product in the activations' dtype and accumulate in at least float32. Weights
may be wider than the activations (float32 masters under bfloat16 activations): they are cast on
the way in, and their gradient leaves in the weights' own dtype without ever having been rounded
to the activations'.

A weight may be a `Blocked`: it is expanded to the activations' dtype before the product, and no
gradient goes to it. With a `TrainedWeight` the gradient goes where that says, and where it has a
rule, the product is that of `fp8_gemm`.

On Hopper GPUs kernels multiply an expert's rows in bfloat16 with its weight in place
(`kernels/bf16_gemm.py`); elsewhere, and of a `Blocked`, it is gathered for every block of rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.quant import tape
from dsv3_jax.quant.expert_rows import by_group, only_live, side_by_side, sum_by_expert
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.fp8_gemm import ACTIVATION_INPUT, INPUT, Activation, fp8_linear
from dsv3_jax.quant.kernels.choice import lacking
from dsv3_jax.quant.trained_weight import TrainedWeight
from dsv3_jax.quant.wide import wide, wide_einsum

Weight = jax.Array | Blocked | TrainedWeight

# Fewer rows than these take several weights one after the other: joining costs a copy of them.
JOINING_ROWS = 64


def few_rows_einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`wide_einsum` for x [..., M, D] of any number of rows M, where w has the same leading sizes.

    For one row of bfloat16, XLA:CPU writes a float32 copy of the weight at every product (161 us
    for 256 x 4096); for two it has a kernel (84 us), so one row goes in twice.
    """
    if x.shape[-2] > 1 or x.dtype == wide(x.dtype):
        return wide_einsum(spec, x, w)
    return wide_einsum(spec, jnp.concatenate([x, x], -2), w)[..., :1, :]


def linear(x: jax.Array, *weights: Weight, activation: Activation | None = None) -> jax.Array:
    """x [..., D] times one weight [D, F], or several side by side -> [..., F + ...] in x's dtype.

    Several are one product: the input and its gradient pass memory once, and the wider product runs
    nearer to the peak. With an `activation` (SwiGLU) the product's input is `activation(x, None)`;
    of the two, low precision keeps x alone for the backward pass.
    """
    if _is_quantised(weights[0]):
        return fp8_linear(_rows(x), weights, activation).reshape(*x.shape[:-1], -1)
    x = _input(x, activation)
    return _linear(x, *_values_and_slots(weights, x.dtype))


def _input(
    x: jax.Array, activation: Activation | None, gate_X1: jax.Array | None = None
) -> jax.Array:
    return activation(checkpoint_name(x, ACTIVATION_INPUT), gate_X1) if activation else x


@jax.custom_vjp
def _linear(x, weights, slots):
    return _linear_fwd(x, weights, slots)[0]


def _linear_fwd(x, weights, slots):
    x = checkpoint_name(x, INPUT)
    x_XD = _rows(x)
    y_XF = _product(partial(few_rows_einsum, "xd,df->xf", x_XD), len(x_XD), weights, x.dtype)
    y_XF = y_XF.astype(x.dtype)
    tape.note(slots, _widths(weights), _wgrad, (x_XD, y_XF))
    return y_XF.reshape(*x.shape[:-1], -1), (x, weights, tape.hollow(slots))


def _linear_bwd(residuals, dy):
    x, weights, slots = residuals
    dy_XF = _rows(dy)
    dx_XD = wide_einsum("xf,df->xd", dy_XF, _joined(weights, dy.dtype)).astype(x.dtype)
    dslots = tape.cotangents(slots, _widths(weights), _wgrad, (_rows(x), dy_XF))
    return dx_XD.reshape(x.shape), None, dslots


_linear.defvjp(_linear_fwd, _linear_bwd)


def _wgrad(x_XD: jax.Array, dy_XF: jax.Array) -> jax.Array:
    return wide_einsum("xd,xf->df", x_XD, dy_XF)


def _is_quantised(w: Weight) -> bool:
    return isinstance(w, TrainedWeight) and w.rule is not None


def _values_and_slots(
    weights: Sequence[Weight], dtype: jnp.dtype
) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    """What is multiplied with, and where gradients go."""
    values = [w.value if isinstance(w, TrainedWeight) else _expanded(w, dtype) for w in weights]
    slots = [
        w.slot if isinstance(w, TrainedWeight) else value
        for w, value in zip(weights, values, strict=True)
    ]
    return tuple(values), tuple(slots)


def _widths(weights: Sequence[jax.Array]) -> tuple[int, ...]:
    return tuple(w.shape[-1] for w in weights)


def _expanded(w: jax.Array | Blocked, dtype: jnp.dtype) -> jax.Array:
    return lax.stop_gradient(w.dequantize(dtype)) if isinstance(w, Blocked) else w


def _product(
    multiply: Callable[[jax.Array], jax.Array],
    rows: int,
    weights: Sequence[jax.Array],
    dtype: jnp.dtype,
) -> jax.Array:
    """Products with several weights side by side: of many rows, one with the weights joined."""
    if rows < JOINING_ROWS:
        return side_by_side([multiply(w.astype(dtype)) for w in weights])
    return multiply(_joined(weights, dtype))


def _joined(weights: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    return side_by_side([w.astype(dtype) for w in weights])


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def grouped_linear(
    x_XD: jax.Array,
    expert_x: jax.Array,
    *weights: Weight,
    activation: Activation | None = None,
    gate_X1: jax.Array | None = None,
    live_X: jax.Array | None = None,
) -> jax.Array:
    """Every block of rows times its own expert's weight, or several side by side as in `linear`.

    x [X, D] holds `len(expert_x)` blocks of equally many rows; expert_x int32 names the expert of
    each, in ascending order where kernels multiply; weights [E, D, F]. With an `activation` the
    input is `activation(x, gate)`. Rows that are not live (bool [X]) count as zeros, whatever they
    hold, and so do their gradients. -> [X, F + ...] in x's dtype.
    """
    if live_X is not None:  # derivatives of choosing see to the gradients
        x_XD = only_live(x_XD, live_X)
        gate_X1 = None if gate_X1 is None else only_live(gate_X1, live_X)
        y_XF = grouped_linear(x_XD, expert_x, *weights, activation=activation, gate_X1=gate_X1)
        return only_live(y_XF, live_X)
    if _is_quantised(weights[0]):
        return fp8_linear(x_XD, weights, activation, gate_X1, expert_x)
    x_XD = _input(x_XD, activation, gate_X1)
    if any(isinstance(w, Blocked) for w in weights):  # only experts in use are expanded
        weights = tuple(_expanded(w[expert_x], x_XD.dtype) for w in weights)
        expert_x = jnp.arange(expert_x.size, dtype=expert_x.dtype)
    return _grouped(x_XD, *_values_and_slots(weights, x_XD.dtype), expert_x)


@jax.custom_vjp
def _grouped(x_XD, weights, slots, expert_x):
    return _grouped_fwd(x_XD, weights, slots, expert_x)[0]


def _grouped_fwd(x_XD, weights, slots, expert_x):
    x_XD = checkpoint_name(x_XD, INPUT)
    x_xMD, dtype = by_group(x_XD, expert_x), x_XD.dtype

    def multiply(w_EDF):
        return wide_einsum("xmd,xdf->xmf", x_xMD, w_EDF[expert_x])

    if _by_kernels(x_XD, sum(_widths(weights)), expert_x):
        y_XF = _kernels().multiply_blocks(x_XD, _joined(weights, dtype), expert_x)
    else:
        y_XF = _rows(_product(multiply, x_xMD.shape[1], weights, dtype).astype(dtype))
    tape.note(slots, _widths(weights), _gradient_of(weights), (x_XD, y_XF, expert_x))
    return y_XF, (x_XD, weights, tape.hollow(slots), expert_x)


def _grouped_bwd(residuals, dy_XF):
    x_XD, weights, slots, expert_x = residuals
    w_EDF = _joined(weights, dy_XF.dtype)
    if _by_kernels(dy_XF, x_XD.shape[1], expert_x):
        dx_XD = _kernels().multiply_blocks(dy_XF, w_EDF, expert_x, transposed=True)
    else:
        dy_xMF = by_group(dy_XF, expert_x)
        dx_XD = _rows(wide_einsum("xmf,xdf->xmd", dy_xMF, w_EDF[expert_x]))
    operands = x_XD, dy_XF, expert_x
    dslots = tape.cotangents(slots, _widths(weights), _gradient_of(weights), operands)
    return dx_XD.astype(x_XD.dtype), None, dslots, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _gradient_of(weights: Sequence[jax.Array]) -> Callable[..., jax.Array]:
    return partial(_grouped_wgrad, num_experts=weights[0].shape[0])


def _grouped_wgrad(
    x_XD: jax.Array, dy_XF: jax.Array, expert_x: jax.Array, num_experts: int
) -> jax.Array:
    if _by_kernels(x_XD, dy_XF.shape[1], expert_x):
        return _kernels().sum_blocks(x_XD, dy_XF, expert_x, num_experts)
    dw_xDF = wide_einsum("xmd,xmf->xdf", by_group(x_XD, expert_x), by_group(dy_XF, expert_x))
    return sum_by_expert(dw_xDF, expert_x, num_experts)


def _by_kernels(x_XD: jax.Array, width: int, expert_x: jax.Array) -> bool:
    """Whether kernels for Hopper GPUs multiply blocks of these rows with weights of this width: all
    sizes are multiples of a tile's 128 (`kernels.tiles`, which old versions of JAX cannot import).
    """
    sizes = len(x_XD) // expert_x.size, x_XD.shape[1], width
    fits = x_XD.dtype == jnp.bfloat16 and all(size and size % 128 == 0 for size in sizes)
    return fits and lacking() is None


def _kernels() -> Any:
    """Imported when they are wanted: Pallas' GPU part takes time, and old versions differ."""
    from dsv3_jax.quant.kernels import bf16_gemm

    return bf16_gemm
