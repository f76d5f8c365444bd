"""Initial weights, RMSNorm and the SwiGLU feed-forward (report 2.1, 4.2)."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.quant.gemm import linear, wide


class Init:
    """Initial weights as a function of seed, parameter path and absolute layer index.

    So a parameter starts the same on every mesh, in every stage split, stacked or not. Values are
    drawn in float32 and then cast: models of different dtypes start from the same weights too.
    Report 4.2: N(0, 0.006^2).
    """

    def __init__(self, key: jax.Array, std: float, dtype: jnp.dtype) -> None:
        self.key, self.std, self.dtype = key, std, dtype

    def at(self, name: str) -> "Init":
        return Init(jax.random.fold_in(self.key, zlib.crc32(name.encode())), self.std, self.dtype)

    def layer(self, index: int | jax.Array) -> "Init":
        """`index` counts from the first layer of the model and may be traced."""
        return Init(jax.random.fold_in(self.key, index), self.std, self.dtype)

    def normal(self, name: str, *shape: int) -> nnx.Param:
        draw = jax.random.normal(self.at(name).key, shape, jnp.float32)
        return nnx.Param((draw * self.std).astype(self.dtype))

    def ones(self, *shape: int) -> nnx.Param:
        return nnx.Param(jnp.ones(shape, self.dtype))


def rms_norm(x_BTD: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * gain over the last dimension; statistics at least float32."""
    x = x_BTD.astype(wide(x_BTD.dtype))
    scale = lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return (x * scale * gain_D.astype(x.dtype)[None, None]).astype(x_BTD.dtype)


def swiglu(gate: jax.Array, up: jax.Array, factor: jax.Array | float = 1.0) -> jax.Array:
    """silu(gate) * up * factor, computed at least in float32, in gate's dtype."""
    g, u = gate.astype(wide(gate.dtype)), up.astype(wide(up.dtype))
    return (jax.nn.silu(g) * u * factor).astype(gate.dtype)


class FeedForward(nnx.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x). Serves the dense layers and the shared expert."""

    def __init__(self, d_model: int, hidden: int, *, init: Init) -> None:
        self.w_gate_DF = init.normal("w_gate_DF", d_model, hidden)
        self.w_up_DF = init.normal("w_up_DF", d_model, hidden)
        self.w_down_FD = init.normal("w_down_FD", hidden, d_model)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(linear(x_BTD, self.w_gate_DF[...]), "ffn_gate")
        up_BTF = checkpoint_name(linear(x_BTD, self.w_up_DF[...]), "ffn_up")
        return linear(swiglu(gate_BTF, up_BTF), self.w_down_FD[...])
