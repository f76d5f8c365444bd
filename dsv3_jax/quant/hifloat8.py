"""HiFloat8 (arXiv 2409.16626): eight bits whose prefix says how many of them are exponent.

After the sign: 11, 10, 01, 001, 0001 announce 4, 3, 2, 1, 0 bits of exponent (its sign, then its
magnitude without the leading 1) and 1, 2, 3, 3, 3 of mantissa; 0000 announces the powers of two
2^-22 to 2^-16, by their number from 1. So the precision is highest near 1 and no scale is needed.
0x00 is 0, 0x80 NaN (so 0 has no sign), 0x6F and 0xEF the infinities. Ties go away from zero. All
256 codes and the ties are those of the package en_dtypes 0.0.4, which however makes infinity of
what is above 1.5 * 2^15; here it saturates, as all formats do.
"""

import jax
import jax.numpy as jnp
import numpy as np

LARGEST, SMALLEST = 2.0**15, 2.0**-22
INFINITY, NAN = 0x6F, 0x80
# First code of a prefix, bits of exponent, bits of mantissa.
FIELDS = ((0x60, 4, 1), (0x40, 3, 2), (0x20, 2, 3), (0x10, 1, 3), (0x08, 0, 3))


def value_of(code: int) -> float:
    """Of a code from 0 to 255."""
    sign, rest = -1.0 if code & 0x80 else 1.0, code & 0x7F
    if code == NAN:
        return np.nan
    if rest == INFINITY:
        return sign * np.inf
    if rest < 8:
        return sign * 2.0 ** (rest - 23) if rest else 0.0
    _, exponent, mantissa = next(field for field in FIELDS if field[0] <= rest)
    power = 0
    if exponent:
        field = rest >> mantissa & ((1 << exponent) - 1)
        leading = 1 << (exponent - 1)
        power = (leading | field & (leading - 1)) * (-1 if field & leading else 1)
    return sign * 2.0**power * (1 + (rest & ((1 << mantissa) - 1)) / (1 << mantissa))


VALUES = np.array([value_of(code) for code in range(256)], np.float32)
FINITE = np.array(sorted(set(range(128)) - {INFINITY}, key=lambda code: VALUES[code]), np.uint8)


def _bounds() -> np.ndarray:
    """Largest float32 that is rounded to each finite number but the last: the one before the middle
    between two.
    """
    values = VALUES[FINITE].astype(np.float64)
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    return np.nextafter(middle, np.float32(0))


BOUNDS = _bounds()


def encode(x: jax.Array) -> jax.Array:
    """Floats, by way of float32 -> the code of the nearest number, uint8."""
    x = x.astype(jnp.float32)
    codes = jnp.asarray(FINITE)[jnp.searchsorted(jnp.asarray(BOUNDS), jnp.abs(x))]
    codes = jnp.where(jnp.isinf(x), jnp.uint8(INFINITY), codes)
    codes = jnp.where((x < 0) & (codes > 0), codes | jnp.uint8(0x80), codes)
    return jnp.where(jnp.isnan(x), jnp.uint8(NAN), codes)


def decode(codes: jax.Array) -> jax.Array:
    """uint8 -> float32."""
    return jnp.asarray(VALUES)[codes]
