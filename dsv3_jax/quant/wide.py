"""High precision: the dtype of its parts, and products that accumulate in it."""

import jax
import jax.numpy as jnp
import numpy as np


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which high-precision parts compute: float32, or float64 for float64 inputs."""
    return np.promote_types(dtype, np.float32)  # jnp's refuses under strict dtype promotion


def wide_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of two arrays of one dtype, accumulated and returned at least in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a.dtype))
