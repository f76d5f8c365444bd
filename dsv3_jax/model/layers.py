"""Initial weights, RMSNorm and the SwiGLU feed-forward (report 2.1, 4.2)."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3_jax.quant.gemm import linear
from dsv3_jax.quant.swiglu import swiglu
from dsv3_jax.quant.wide import wide


class Init:
    """Initial weights as a function of seed, parameter path and absolute layer index.

    So a parameter starts the same on every mesh, in every stage split, stacked or not. Values are
    drawn in float32 and then cast: models of different dtypes start from the same weights too.
    Report 4.2: N(0, 0.006^2).
    """

    def __init__(self, key: jax.Array, std: float, dtype: jnp.dtype) -> None:
        self.key, self.std, self.dtype = key, std, dtype

    def at(self, name: str) -> "Init":
        return self.deeper(zlib.crc32(name.encode()))

    def layer(self, index: int | jax.Array) -> "Init":
        """`index` counts from the first layer of the model and may be traced."""
        return self.deeper(index)

    def deeper(self, number: int | jax.Array) -> "Init":
        """Of whatever the number stands for there."""
        return Init(jax.random.fold_in(self.key, number), self.std, self.dtype)

    def normal(self, name: str, *shape: int) -> nnx.Param:
        return nnx.Param(self.drawn(self.at(name).key, shape))

    def drawn(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The value of a parameter, from its own key."""
        return (jax.random.normal(key, shape, jnp.float32) * self.std).astype(self.dtype)

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, self.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BTD: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last dimension; statistics at least float32."""
    return _rms_norm_fwd(x_BTD, gain_D, eps)[0]


def _rms_norm_fwd(x_BTD, gain_D, eps):
    x = x_BTD.astype(wide(x_BTD.dtype))
    scale = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    y_BTD = (x * scale * gain_D.astype(x.dtype)[None, None]).astype(x_BTD.dtype)
    return y_BTD, (x_BTD, gain_D, scale)


def _rms_norm_bwd(eps, residuals, dy_BTD):
    del eps
    x_BTD, gain_D, scale_BT1 = residuals
    unit_BTD = x_BTD.astype(scale_BT1.dtype) * scale_BT1
    dy_BTD = dy_BTD.astype(scale_BT1.dtype)
    dunit_BTD = dy_BTD * gain_D.astype(dy_BTD.dtype)[None, None]
    along_BT1 = jnp.mean(dunit_BTD * unit_BTD, -1, keepdims=True)
    dx_BTD = (dunit_BTD - unit_BTD * along_BT1) * scale_BT1
    dgain_D = (dy_BTD * unit_BTD).sum((0, 1))
    return dx_BTD.astype(x_BTD.dtype), dgain_D.astype(gain_D.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


class FeedForward(nnx.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x). Serves the dense layers and the shared expert."""

    def __init__(self, d_model: int, hidden: int, *, init: Init) -> None:
        self.w_gate_DF = init.normal("w_gate_DF", d_model, hidden)
        self.w_up_DF = init.normal("w_up_DF", d_model, hidden)
        self.w_down_FD = init.normal("w_down_FD", hidden, d_model)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_up_BT_FF = linear(x_BTD, self.w_gate_DF[...], self.w_up_DF[...])
        return linear(gate_up_BT_FF, self.w_down_FD[...], activation=swiglu)
