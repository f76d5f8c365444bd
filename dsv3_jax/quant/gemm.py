"""Matrix products with their derivative rules: the linear, and the grouped linear of the experts
(report 3.3).

Operands enter the product in the activations' dtype and accumulate in at least float32. Weights
may be wider than the activations (float32 masters under bfloat16 activations): they are cast on
the way in, and their gradient leaves in the weights' own dtype without ever having been rounded
to the activations'.

A weight may be a `Blocked`: it is expanded to the activations' dtype before the product, and no
gradient goes to it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.quant.fp8 import Blocked


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which high-precision parts compute: float32, or float64 for float64 inputs."""
    return np.promote_types(dtype, np.float32)  # jnp's refuses under strict dtype promotion


def wide_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two arrays of one dtype, accumulated and returned at least in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a.dtype))


def few_rows_einsum(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`wide_einsum` for x [..., M, D] of any number of rows M, where w has the same leading sizes.

    For one row of bfloat16, XLA:CPU writes a float32 copy of the weight at every product (161 us
    for 256 x 4096); for two it has a kernel (84 us), so one row goes in twice.
    """
    if x.shape[-2] > 1 or x.dtype == wide(x.dtype):
        return wide_einsum(spec, x, w)
    return wide_einsum(spec, jnp.concatenate([x, x], -2), w)[..., :1, :]


def linear(x: jax.Array, w_DF: jax.Array | Blocked) -> jax.Array:
    """x [..., D] times w [D, F] -> [..., F] in x's dtype."""
    return _linear(x, _constant(w_DF, x.dtype) if isinstance(w_DF, Blocked) else w_DF)


@jax.custom_vjp
def _linear(x, w_DF):
    return _linear_fwd(x, w_DF)[0]


def _linear_fwd(x, w_DF):
    y_XF = few_rows_einsum("xd,df->xf", _rows(x), w_DF.astype(x.dtype))
    return y_XF.astype(x.dtype).reshape(*x.shape[:-1], -1), (x, w_DF)


def _linear_bwd(residuals, dy):
    x, w_DF = residuals
    dy_XF = _rows(dy)
    dx_XD = wide_einsum("xf,df->xd", dy_XF, w_DF.astype(dy.dtype)).astype(x.dtype)
    dw_DF = wide_einsum("xd,xf->df", _rows(x), dy_XF).astype(w_DF.dtype)
    return dx_XD.reshape(x.shape), dw_DF


_linear.defvjp(_linear_fwd, _linear_bwd)


def _constant(w: Blocked, dtype: jnp.dtype) -> jax.Array:
    return lax.stop_gradient(w.dequantize(dtype))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def grouped_linear(x_XD: jax.Array, w_EDF: jax.Array | Blocked, expert_x: jax.Array) -> jax.Array:
    """Every block of rows times the weight of its own expert.

    x [X, D] holds `len(expert_x)` blocks of equally many rows; expert_x int32 names the expert of
    each. -> [X, F] in x's dtype.
    """
    if isinstance(w_EDF, Blocked):  # only experts in use are expanded: one a block of rows
        w_xDF = _constant(w_EDF[expert_x], x_XD.dtype)
        return _grouped(x_XD, w_xDF, jnp.arange(expert_x.size, dtype=expert_x.dtype))
    return _grouped(x_XD, w_EDF, expert_x)


@jax.custom_vjp
def _grouped(x_XD, w_EDF, expert_x):
    return _grouped_fwd(x_XD, w_EDF, expert_x)[0]


def _blocks(x_XD: jax.Array, expert_x: jax.Array) -> jax.Array:
    """[x, M, D]: M rows of each block x."""
    return x_XD.reshape(expert_x.size, -1, x_XD.shape[-1])


def _grouped_fwd(x_XD, w_EDF, expert_x):
    w_xDF = w_EDF.astype(x_XD.dtype)[expert_x]
    y_xMF = wide_einsum("xmd,xdf->xmf", _blocks(x_XD, expert_x), w_xDF).astype(x_XD.dtype)
    return _rows(y_xMF), (x_XD, w_EDF, expert_x)


def _grouped_bwd(residuals, dy_XF):
    x_XD, w_EDF, expert_x = residuals
    dy_xMF = _blocks(dy_XF, expert_x)
    w_xDF = w_EDF.astype(dy_XF.dtype)[expert_x]
    dx_xMD = wide_einsum("xmf,xdf->xmd", dy_xMF, w_xDF).astype(x_XD.dtype)
    dw_xDF = wide_einsum("xmd,xmf->xdf", _blocks(x_XD, expert_x), dy_xMF)
    # Each expert's blocks are summed by a product with a one-hot matrix. It costs E / rows of the
    # products above (12 % at 16 experts), less than a scatter-add, which XLA:CPU runs on one core.
    onehot_xE = jax.nn.one_hot(expert_x, w_EDF.shape[0], dtype=dw_xDF.dtype)
    dw_EDF = jnp.einsum("xe,xdf->edf", onehot_xE, dw_xDF).astype(w_EDF.dtype)
    return _rows(dx_xMD), dw_EDF, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
