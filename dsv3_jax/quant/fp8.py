"""Low-precision values with one scale per block of a matrix (report 3.3.2).

`Blocked` is what the published weights are: E4M3 values, and a float32 scale for every 128x128
block, by which the block's values are multiplied. Sizes that are no multiple of the block end in
one short block. A weight's tensor name keeps its suffix, that of its scales is in lower case:
`w_DF` and `s_df`.

A scale is the block's largest magnitude over the format's largest number (448 for E4M3), or the
next power of two above it. It has no floor but that of float32's normal numbers: below, XLA would
flush to zero. MX formats take the power of two that brings the largest magnitude's exponent to the
format's largest: up to 1.75 is then saturated to 1.75 (E4M3).
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.quant.formats import format_of

WEIGHT_BLOCK = (128, 128)
Scale = Literal["float32", "pow2", "mx"]


@partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["block", "fmt"]
)
@dataclass(frozen=True)
class Blocked:
    """values [..., D, F], as `formats` stores numbers of `fmt`, and scales float32
    [..., ceil(D / block[0]), ceil(F / block[1])].

    Behaves as an array of shape `values.shape` where layers handle weights: `w[...]` is itself,
    `w[i]` indexes leading dimensions, `w.astype(dtype)` is `w.dequantize(dtype)`.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = field(default=WEIGHT_BLOCK)
    fmt: str = "e4m3"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def __getitem__(self, index: Any) -> "Blocked":
        if index is Ellipsis:
            return self
        return replace(self, values=self.values[index], scales=self.scales[index])

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """values * scales, multiplied in float32 and rounded once to `dtype`."""
        parts = _parts(format_of(self.fmt).decode(self.values), self.block)
        return _whole(parts * _per_block(self.scales), self.shape).astype(dtype)

    astype = dequantize


def quantize(
    x: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: str = "e4m3",
    scale: Scale = "float32",
) -> Blocked:
    """x [..., D, F] of any float dtype -> x ≈ values * scales, block by block, rounded to nearest.

    A block of zeros has scale 1. NaN and infinities stay what they are in their place (NaN in E4M3,
    which has no infinity) and do not enter their block's scale. ValueError for a `fmt` that is not
    in `formats.FORMATS`, another `scale`, or a block without elements.
    """
    return scaled(x, block_scales(x, block, fmt, scale), block, fmt)


def fake_quantize(
    x: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: str = "e4m3",
    scale: Scale = "float32",
) -> jax.Array:
    """`quantize(...).dequantize()` without the stored numbers: the same float32, bit for bit."""
    parts, scales = divided(x, block, fmt, scale)
    return _whole(format_of(fmt).round(parts) * _per_block(scales), x.shape)


def divided(
    x: jax.Array, block: tuple[int, int], fmt: str, scale: Scale
) -> tuple[jax.Array, jax.Array]:
    """x by blocks over their scales, float32 [..., rows of blocks, rows of a block, columns of
    blocks, columns of a block] and filled up with zeros; and those scales.
    """
    scales = block_scales(x, block, fmt, scale)
    return _quotients(_parts(x.astype(jnp.float32), block), scales), scales


def retile(x: Blocked, block: tuple[int, int], scale: Scale = "pow2") -> Blocked:
    """The same numbers in other blocks: 1x128 as 128x1 for the weight gradient (report 3.5.2).

    With powers of two before and after, exact wherever the value stays a normal number of the
    format in its new block: only the exponent moves.
    """
    return quantize(x.dequantize(), block, x.fmt, scale)


def block_scales(
    x: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: str = "e4m3",
    scale: Scale = "float32",
) -> jax.Array:
    """Those of `quantize`."""
    largest = format_of(fmt).largest
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}; allowed: {', '.join(map(repr, get_args(Scale)))}")
    if min(block) < 1:
        raise ValueError(f"block is {block}; allowed: sizes of at least 1")
    return scales_of_maxima(_block_maxima(x.astype(jnp.float32), block), largest, scale)


def scaled(
    x: jax.Array,
    scales: jax.Array,
    block: tuple[int, int] = (1, 128),
    fmt: str = "e4m3",
) -> Blocked:
    """What `quantize` makes of x with these scales."""
    parts, largest = _parts(x.astype(jnp.float32), block), format_of(fmt).largest
    # By scales that are not x's own, the quotient of what is finite may not be.
    quotients = jnp.clip(_quotients(parts, scales), -largest, largest)
    quotients = jnp.where(jnp.isfinite(parts), quotients, parts)
    return Blocked(format_of(fmt).encode(_whole(quotients, x.shape)), scales, block, fmt)


def _quotients(parts: jax.Array, scales: jax.Array) -> jax.Array:
    """Parts over their scales.

    By a scale that it sees to be one for many, XLA:CPU multiplies with the inverse, which now and
    then is another number of 8 bits; so each element has a divisor of its own.
    """
    return parts / jnp.where(jnp.isfinite(parts), _per_block(scales), 1)


def grid(shape: tuple[int, ...], block: tuple[int, int] = WEIGHT_BLOCK) -> tuple[int, ...]:
    """Shape of the scales of values of this shape."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def abstract_blocked(shape: tuple[int, ...]) -> Blocked:
    """Shapes and dtypes of a weight of this shape in 128x128 blocks of E4M3."""
    return Blocked(
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct(grid(shape), jnp.float32),
    )


def _parts(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """x by blocks, [..., rows of blocks, rows of a block, columns of blocks, columns of a block],
    filled up with zeros.
    """
    block = tuple(max(1, min(pair)) for pair in zip(block, x.shape[-2:], strict=True))
    pad = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % block[0]), (0, -x.shape[-1] % block[1])]
    rows, columns = grid(x.shape, block)[-2:]
    filled = jnp.pad(x, pad) if any(map(max, pad)) else x
    return filled.reshape(*x.shape[:-2], rows, block[0], columns, block[1])


def _whole(parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`_parts` undone."""
    r, m, c, n = parts.shape[-4:]
    whole = parts.reshape(*shape[:-2], r * m, c * n)
    return whole if whole.shape == shape else whole[..., : shape[-2], : shape[-1]]


def _per_block(scales: jax.Array) -> jax.Array:
    """Each block's scale for its `_parts`."""
    return scales[..., :, None, :, None]


def _block_maxima(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Largest finite magnitude in each block."""
    parts = _parts(x, block)
    return jnp.where(jnp.isfinite(parts), jnp.abs(parts), 0).max((-3, -1))


def scales_of_maxima(maxima: jax.Array, largest: float, scale: Scale) -> jax.Array:
    """maxima / largest, at least the smallest normal number; 1 where a block is all zero.

    Elementwise and of 32-bit numbers alone: kernels call it on what they hold in registers.
    """
    bits_of_largest = int(np.float32(largest).view(np.int32))
    if scale == "pow2":
        # In the bits: exponent and mantissa of the quotient, rounded up to the next exponent.
        exponents = (_bits(maxima) - bits_of_largest + 0x7FFFFF) >> 23
        # Largest number times scale is to be finite: above, it is rather saturated.
        scales = _power_of_two(jnp.minimum(exponents, 127 - math.frexp(largest)[1] + 1))
    elif scale == "mx":
        scales = _power_of_two((_bits(maxima) >> 23) - (bits_of_largest >> 23))
    else:
        # XLA would make a division by a constant this product, but only under jit.
        scales = jnp.maximum(maxima * jnp.float32(1 / largest), jnp.finfo(jnp.float32).tiny)
    return jnp.where(maxima == 0, 1, scales)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32, at least the smallest normal number."""
    return lax.bitcast_convert_type((jnp.maximum(exponent, -126) + 127) << 23, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
