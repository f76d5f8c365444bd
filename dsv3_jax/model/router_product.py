"""The router's product on Hopper GPUs, of tokens in bfloat16, in float32 like elsewhere.

Tensor cores take no float32, and without them cuBLAS is slow at so few experts: of 32,768 tokens,
2,048 x 32, forwards 329 us and for the weight's gradient 257 to 1,150 us, as it lies (H200). But a
float32 is a sum of three bfloat16s, to the last of its 24 bits (above 2^-100), and products of
bfloat16s are exact in float32. So what is float32 is multiplied in three parts, side by side: 97
and 80 us.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.quant.kernels.choice import lacking

PARTS = 3
LEAST_TOKENS = 512
"""For fewer, as in decoding, more bytes would be moved to part the weight than it saves: by XLA's
estimate 30 MB instead of 12 for 64 tokens of 7168 x 256, 92 instead of 305 for 4096"""


def fits(x_BTD: jax.Array) -> bool:
    """Whether `router_product` is for these tokens on this machine."""
    batch, tokens, _ = x_BTD.shape
    many = batch * tokens >= LEAST_TOKENS
    return many and x_BTD.dtype == jnp.bfloat16 and lacking() is None


@jax.custom_vjp
def router_product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """x bfloat16 [B, T, D] times w float32 [D, E] -> float32 [B, T, E], neither of them rounded."""
    logits_BTPE = jnp.einsum(
        "btd,dpe->btpe", x_BTD, in_parts(w_DE, 1), preferred_element_type=jnp.float32
    )
    return logits_BTPE.sum(2)


def _forward(x_BTD, w_DE):
    return router_product(x_BTD, w_DE), (x_BTD, w_DE)


def _backward(residuals, dlogits_BTE):
    x_BTD, w_DE = residuals
    dx_BTD = jnp.einsum("bte,de->btd", dlogits_BTE, w_DE, precision=lax.Precision.HIGHEST)
    dw_DPE = jnp.einsum(
        "btd,btpe->dpe", x_BTD, in_parts(dlogits_BTE, 2), preferred_element_type=jnp.float32
    )
    return dx_BTD.astype(x_BTD.dtype), dw_DPE.sum(1)


router_product.defvjp(_forward, _backward)


def in_parts(x: jax.Array, axis: int) -> jax.Array:
    """float32 as bfloat16s that sum up to it, along a new axis, the largest first."""
    parts = []
    for _ in range(PARTS):
        # By `reduce_precision`, since XLA may leave out a cast to bfloat16 and back.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.stack(parts, axis)
