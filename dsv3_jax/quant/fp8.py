"""FP8 values with one scale per block of a matrix (report 3.3.2).

`Blocked` is what the published weights are: E4M3 values, and a float32 scale for every 128x128
block, by which the block's values are multiplied. Sizes that are no multiple of the block end in
one short block. A weight's tensor name keeps its suffix, that of its scales is in lower case:
`w_DF` and `s_df`.

A scale is the block's largest magnitude over 448, E4M3's largest number, or the next power of two
above it. It has no floor but that of float32's normal numbers: below, XLA would flush to zero.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

WEIGHT_BLOCK = (128, 128)
FORMATS = {"e4m3": (jnp.float8_e4m3fn, 448.0)}  # dtype and largest finite number


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["block"])
@dataclass(frozen=True)
class Blocked:
    """values [..., D, F] and scales float32 [..., ceil(D / block[0]), ceil(F / block[1])].

    Behaves as an array of shape `values.shape` where layers handle weights: `w[...]` is itself,
    `w[i]` indexes leading dimensions, `w.astype(dtype)` is `w.dequantize(dtype)`.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = field(default=WEIGHT_BLOCK)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def __getitem__(self, index: Any) -> "Blocked":
        if index is Ellipsis:
            return self
        return Blocked(self.values[index], self.scales[index], self.block)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """values * scales, multiplied in float32 and rounded once to `dtype`."""
        wide = self.values.astype(jnp.float32) * _spread(self.scales, self.block, self.shape)
        return wide.astype(dtype)

    astype = dequantize


def quantize(
    x: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: Literal["e4m3"] = "e4m3",
    scale: Literal["float32", "pow2"] = "float32",
) -> Blocked:
    """x [..., D, F] of any float dtype -> x ≈ values * scales, block by block, rounded to nearest.

    A block of zeros has scale 1. NaN and infinities become NaN in their place and do not enter
    their block's scale. ValueError for another `fmt` or `scale`.
    """
    return scaled(x, block_scales(x, block, fmt, scale), block, fmt)


def block_scales(
    x: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: Literal["e4m3"] = "e4m3",
    scale: Literal["float32", "pow2"] = "float32",
) -> jax.Array:
    """Those of `quantize`."""
    if fmt not in FORMATS:
        raise ValueError(f"fmt is {fmt!r}; allowed: {', '.join(map(repr, FORMATS))}")
    if scale not in ("float32", "pow2"):
        raise ValueError(f"scale is {scale!r}; allowed: 'float32', 'pow2'")
    return _scales(_block_maxima(x.astype(jnp.float32), block), FORMATS[fmt][1], scale == "pow2")


def scaled(
    x: jax.Array,
    scales: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: Literal["e4m3"] = "e4m3",
) -> Blocked:
    """What `quantize` makes of x with these scales."""
    dtype, largest = FORMATS[fmt]
    x = x.astype(jnp.float32)
    quotient = jnp.clip(x / _spread(scales, block, x.shape), -largest, largest)
    return Blocked(jnp.where(jnp.isfinite(x), quotient, jnp.nan).astype(dtype), scales, block)


def grid(shape: tuple[int, ...], block: tuple[int, int] = WEIGHT_BLOCK) -> tuple[int, ...]:
    """Shape of the scales of values of this shape."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def abstract_blocked(shape: tuple[int, ...]) -> Blocked:
    """Shapes and dtypes of a weight of this shape in 128x128 blocks of E4M3."""
    return Blocked(
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct(grid(shape), jnp.float32),
    )


def _spread(scales: jax.Array, block: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Each block's scale at each of its elements."""
    rows = jnp.repeat(scales, block[0], axis=-2)[..., : shape[-2], :]
    return jnp.repeat(rows, block[1], axis=-1)[..., : shape[-1]]


def _block_maxima(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Largest finite magnitude in each block."""
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    pad = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % block[0]), (0, -x.shape[-1] % block[1])]
    rows, columns = grid(x.shape, block)[-2:]
    parts = jnp.pad(magnitude, pad).reshape(*x.shape[:-2], rows, block[0], columns, block[1])
    return parts.max((-3, -1))


def _scales(maxima: jax.Array, largest: float, pow2: bool) -> jax.Array:
    """maxima / largest, at least the smallest normal number; 1 where a block is all zero."""
    if pow2:
        # In the bits: exponent and mantissa of the quotient, rounded up to the next exponent.
        quotient = _bits(maxima) - _bits(jnp.float32(largest))
        exponent = jnp.maximum((quotient + 0x7FFFFF) >> 23, -126)
        scales = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    else:
        # XLA would make a division by a constant this product, but only under jit.
        scales = jnp.maximum(maxima * jnp.float32(1 / largest), jnp.finfo(jnp.float32).tiny)
    return jnp.where(maxima == 0, 1, scales)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
