"""Causal attention as one kernel of cuDNN's, on Hopper GPUs (report Eq. 10).

`jax.nn.dot_product_attention` asks for keys and values of one size; filled up to 192, MLA's values
of 128 took 1.46 times as long forwards and backwards (H200, 4 rows of 4,096 tokens, 16 heads). What
it calls knows better, and is used here. It has no segments in the layout of whole rows.
"""

from functools import cache

import jax
import jax.numpy as jnp

from dsv3_jax.quant.kernels.choice import lacking

# The equation whose results, the output and the log-sum-exp, its derivative rule wants again.
FORWARD = "dot_product_attention_fwd_wrapper"
OLDEST_CUDNN = 91000  # that knows two sizes of heads
LARGEST_HEAD = 256
TOKENS = 128
"""Rows have a multiple of so many: others were never tried"""


def fits(q_BTHN: jax.Array, v_BTHU: jax.Array, segments_BT: jax.Array | None) -> bool:
    """Whether `fused_attention` can be asked for these."""
    sizes = q_BTHN.shape[-1], v_BTHU.shape[-1]
    return (
        segments_BT is None
        and q_BTHN.dtype == jnp.bfloat16
        and q_BTHN.shape[1] % TOKENS == 0
        and all(size % 8 == 0 and size <= LARGEST_HEAD for size in sizes)
        and _usable()
    )


@cache
def _usable() -> bool:
    if lacking():
        return False
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        return check_cudnn_version() >= OLDEST_CUDNN
    except (ImportError, RuntimeError):  # another JAX, or one without cuDNN
        return False


def fused_attention(
    q_BTHN: jax.Array, k_BTHN: jax.Array, v_BTHU: jax.Array, scale: float
) -> jax.Array:
    """`plain_attention` over as many keys as queries. -> [B, T, H, U] bfloat16."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(q_BTHN, k_BTHN, v_BTHU, scale=scale, mask_type=MaskType.CAUSAL)
