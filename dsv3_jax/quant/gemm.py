"""Matrix products with their derivative rules: the linear, and the grouped linear of the experts
(report 3.3).

Operands enter the product in the activations' dtype and accumulate in at least float32. Weights
may be wider than the activations (float32 masters under bfloat16 activations): they are cast on
the way in, and their gradient leaves in the weights' own dtype without ever having been rounded
to the activations'.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which high-precision parts compute: float32, or float64 for float64 inputs."""
    return np.promote_types(dtype, np.float32)  # jnp's refuses under strict dtype promotion


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], batch: int = 0) -> jax.Array:
    """Product over a dimension of each side; leading `batch` dimensions in common; result wide."""
    dims = (((contract[0],), (contract[1],)), (tuple(range(batch)),) * 2)
    return lax.dot_general(a, b, dims, preferred_element_type=wide(a.dtype))


@jax.custom_vjp
def linear(x: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x [..., D] times w [D, F] -> [..., F] in x's dtype."""
    return _linear_fwd(x, w_DF)[0]


def _linear_fwd(x, w_DF):
    y_XF = dot(x.reshape(-1, x.shape[-1]), w_DF.astype(x.dtype), (1, 0))
    return y_XF.astype(x.dtype).reshape(*x.shape[:-1], -1), (x, w_DF)


def _linear_bwd(residuals, dy):
    x, w_DF = residuals
    dy_XF = dy.reshape(-1, dy.shape[-1])
    dx_XD = dot(dy_XF, w_DF.astype(dy.dtype), (1, 1)).astype(x.dtype)
    dw_DF = dot(x.reshape(-1, x.shape[-1]), dy_XF, (0, 0)).astype(w_DF.dtype)
    return dx_XD.reshape(x.shape), dw_DF


linear.defvjp(_linear_fwd, _linear_bwd)


@jax.custom_vjp
def grouped_linear(x_XD: jax.Array, w_EDF: jax.Array, expert_x: jax.Array) -> jax.Array:
    """Every block of rows times the weight of its own expert.

    x [X, D] holds `len(expert_x)` blocks of equally many rows; expert_x int32 names the expert of
    each. -> [X, F] in x's dtype.
    """
    return _grouped_fwd(x_XD, w_EDF, expert_x)[0]


def _blocks(x_XD: jax.Array, expert_x: jax.Array) -> jax.Array:
    return x_XD.reshape(expert_x.size, -1, x_XD.shape[-1])


def _grouped_fwd(x_XD, w_EDF, expert_x):
    w_xDF = w_EDF.astype(x_XD.dtype)[expert_x]
    y = dot(_blocks(x_XD, expert_x), w_xDF, (2, 1), batch=1).astype(x_XD.dtype)
    return y.reshape(x_XD.shape[0], -1), (x_XD, w_EDF, expert_x)


def _grouped_bwd(residuals, dy_XF):
    x_XD, w_EDF, expert_x = residuals
    dy = _blocks(dy_XF, expert_x)
    w_xDF = w_EDF.astype(dy.dtype)[expert_x]
    dx_XD = dot(dy, w_xDF, (2, 2), batch=1).astype(x_XD.dtype).reshape(x_XD.shape)
    dw_xDF = dot(_blocks(x_XD, expert_x), dy, (1, 1), batch=1)
    # Each expert's blocks are summed by a product with a one-hot matrix. It costs E / rows of the
    # products above (12 % at 16 experts), less than a scatter-add, which XLA:CPU runs on one core.
    onehot_xE = jax.nn.one_hot(expert_x, w_EDF.shape[0], dtype=dw_xDF.dtype)
    dw_EDF = jnp.einsum("xe,xdf->edf", onehot_xE, dw_xDF).astype(w_EDF.dtype)
    return dx_XD, dw_EDF, None


grouped_linear.defvjp(_grouped_fwd, _grouped_bwd)
