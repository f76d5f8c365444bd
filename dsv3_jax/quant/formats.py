"""Number formats of 8 and 12 bits: E4M3 and E5M6 of the report (3.3.2, 3.3.3), E5M2 and HiFloat8
to compare them with, and the power-of-two scales of DeepSeek-V3.1 in one byte (UE8M0).

A number is stored as a float8 array where JAX has the type, else as its code: E5M6 in uint16
(`pack12` makes three bytes of two), HiFloat8 in uint8. The report does not say how E5M6 is laid
out; here it is the upper 12 bits of a float16. Casts go from float32 to the nearest number, ties to
the even code (HiFloat8: away from zero), and saturate: what is larger than the largest number
becomes that. NaN stays NaN and infinity infinity, or NaN in E4M3, which has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.quant import hifloat8


@dataclass(frozen=True)
class Format:
    """How numbers are cast and what they reach."""

    bits: int
    """Of one number"""
    largest: float
    """Finite number"""
    smallest_normal: float
    """Below it numbers lose precision; of HiFloat8, the smallest with a mantissa"""
    smallest: float
    """Positive number"""
    encode: Callable[[jax.Array], jax.Array]
    """Floats of any shape, by way of float32 -> stored numbers of that shape"""
    decode: Callable[[jax.Array], jax.Array]
    """Stored numbers -> float32, exactly"""
    round: Callable[[jax.Array], jax.Array]
    """Floats -> float32: `decode(encode(x))` without the stored numbers"""


class Lost(NamedTuple):
    """How many elements a cast did not keep; int32, so of fewer than 2^31."""

    saturated: jax.Array
    """Finite and beyond the largest number, by more than a scale's last bits"""
    underflowed: jax.Array
    """At least 2^-126, and 0 afterwards"""


def lost(x: jax.Array, fmt: str) -> Lost:
    """What casting x (any shape, at most float32) to the format loses."""
    fmt, x = format_of(fmt), x.astype(jnp.float32)
    saturated = jnp.isfinite(x) & (jnp.abs(x) > fmt.largest * (1 + 2.0**-20))
    # XLA:CPU takes what is below float32's normal numbers for 0, though not everywhere.
    is_zero = jnp.abs(x) < jnp.finfo(jnp.float32).tiny
    underflowed = ~is_zero & (fmt.round(x) == 0)
    return Lost(saturated.sum(dtype=jnp.int32), underflowed.sum(dtype=jnp.int32))


def format_of(name: str) -> Format:
    """ValueError for a name that is not in `FORMATS`."""
    if name not in FORMATS:
        raise ValueError(f"fmt is {name!r}; allowed: {', '.join(map(repr, FORMATS))}")
    return FORMATS[name]


def pack12(codes: jax.Array) -> jax.Array:
    """uint16 codes of 12 bits [..., N] -> bytes [..., 3 ceil(N / 2)]: the low bytes of a pair, then
    the upper four bits of both in one.
    """
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    first, second = codes[..., ::2], codes[..., 1::2]
    parts = first & 0xFF, second & 0xFF, first >> 8 | second >> 8 << 4
    packed = jnp.stack([part.astype(jnp.uint8) for part in parts], -1)
    return packed.reshape(*codes.shape[:-1], 3 * first.shape[-1])


def unpack12(packed: jax.Array, size: int) -> jax.Array:
    """The `size` codes that `pack12` packed, uint16 [..., size]."""
    first, second, both = (packed[..., i::3].astype(jnp.uint16) for i in range(3))
    codes = jnp.stack([first | (both & 0xF) << 8, second | both >> 4 << 8], -1)
    return codes.reshape(*packed.shape[:-1], 2 * first.shape[-1])[..., :size]


def to_ue8m0(scales: jax.Array) -> jax.Array:
    """Float32 powers of two from 2^-126 to 2^127 -> `float8_e8m0fnu`, exactly, one byte each."""
    return lax.bitcast_convert_type((_bits(scales) >> 23).astype(jnp.uint8), jnp.float8_e8m0fnu)


def from_ue8m0(scales: jax.Array) -> jax.Array:
    """Back to float32, for what `to_ue8m0` made: 2^-127 would be flushed to 0. In bits, as XLA:CPU
    has no conversion of its own.
    """
    exponent = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.uint32)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _code(
    x: jax.Array, *, bits: int, mantissa: int, bias: int, largest: float, infinity: int, nan: int
) -> jax.Array:
    """Codes of a format with sign, exponent and mantissa, uint32: the rounding done in float32's
    bits.
    """
    x = x.astype(jnp.float32)
    magnitude, dropped = jnp.minimum(jnp.abs(x), largest), 23 - mantissa
    wide = _bits(magnitude)
    # Half of the last place carries into it, the half itself only if the last place is odd.
    carry = jnp.uint32((1 << (dropped - 1)) - 1) + ((wide >> dropped) & 1)
    normal = ((wide + carry) >> dropped) - jnp.uint32((127 - bias) << mantissa)
    # Added to a number whose last place is the format's smallest step, what is below the normal
    # numbers is rounded to steps.
    steps = jnp.float32(2.0 ** (1 - bias + dropped))
    below = _bits(magnitude + steps) - _bits(steps)
    code = jnp.where(magnitude < 2.0 ** (1 - bias), below, normal)
    code = jnp.where(jnp.isinf(x), infinity, jnp.where(jnp.isnan(x), nan, code))
    return code | (_bits(x) >> 31) << (bits - 1)


def _number(
    codes: jax.Array, *, bits: int, mantissa: int, bias: int, infinity: int, nan: int
) -> jax.Array:
    """The numbers of codes (uint32), float32. XLA:CPU's own conversion takes twice the time."""
    magnitude = codes & ((1 << (bits - 1)) - 1)
    normal = _float((magnitude << (23 - mantissa)) + jnp.uint32((127 - bias) << 23))
    below = magnitude.astype(jnp.float32) * jnp.float32(2.0 ** (1 - bias - mantissa))
    x = jnp.where(magnitude < 1 << mantissa, below, normal)
    x = jnp.where(magnitude >= infinity, jnp.where(magnitude == infinity, jnp.inf, jnp.nan), x)
    x = jnp.where(magnitude == nan, jnp.nan, x)
    return _float(_bits(x) | (codes >> (bits - 1)) << 31)


def _rounded(
    x: jax.Array, *, mantissa: int, bias: int, largest: float, has_infinity: bool
) -> jax.Array:
    """Added to a number 2^(23 - mantissa) times as large, a number loses what is below its last
    place in the format; below the normal numbers that place is the smallest step.
    """
    x = x.astype(jnp.float32)
    magnitude = jnp.minimum(jnp.abs(x), largest)
    exponent = jnp.maximum(_bits(magnitude) & 0x7F800000, jnp.uint32((128 - bias) << 23))
    lifted = _float(exponent + jnp.uint32((23 - mantissa) << 23))
    rounded = (magnitude + lifted) - lifted
    special = jnp.inf if has_infinity else jnp.nan
    rounded = jnp.where(jnp.isinf(x), special, jnp.where(jnp.isnan(x), jnp.nan, rounded))
    return _float(_bits(rounded) | (_bits(x) >> 31) << 31)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _small_float(
    bits: int,
    mantissa: int,
    bias: int,
    largest: float,
    infinity: int,
    nan: int,
    dtype: jnp.dtype,
) -> Format:
    """A format with sign, exponent and mantissa, stored in `dtype`."""
    integer = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    layout = {"mantissa": mantissa, "bias": bias}
    codes = {"bits": bits, **layout, "infinity": infinity, "nan": nan}

    def encode(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(_code(x, largest=largest, **codes).astype(integer), dtype)

    def decode(stored: jax.Array) -> jax.Array:
        return _number(lax.bitcast_convert_type(stored, integer).astype(jnp.uint32), **codes)

    normal = 2.0 ** (1 - bias)
    rounded = partial(_rounded, largest=largest, has_infinity=infinity != nan, **layout)
    return Format(bits, largest, normal, normal / 2**mantissa, encode, decode, rounded)


FORMATS = {
    "e4m3": _small_float(8, 3, 7, 448.0, 0x7F, 0x7F, jnp.float8_e4m3fn),
    "e5m2": _small_float(8, 2, 15, 57344.0, 0x7C, 0x7E, jnp.float8_e5m2),
    "e5m6": _small_float(12, 6, 15, 65024.0, 0x7C0, 0x7E0, jnp.uint16),
    "hif8": Format(
        8,
        hifloat8.LARGEST,
        2.0**-15,
        hifloat8.SMALLEST,
        hifloat8.encode,
        hifloat8.decode,
        lambda x: hifloat8.decode(hifloat8.encode(x)),
    ),
}
