"""What rows look like between devices: FP8 with powers of two as scales, or as they are
(report 3.3.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.quant.formats import from_ue8m0, to_ue8m0
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Operand, Rule
from dsv3_jax.quant.trained_weight import TrainedWeight


class Wire(NamedTuple):
    """How rows travel to experts: forward, and gradients of experts' outputs. None: as they are.

    Of the way back nothing is said: results and gradients of inputs go in the activations' dtype.
    """

    there: Operand | None = None
    back: Operand | None = None


PLAIN = Wire()


class Packed(NamedTuple):
    """Rows of E4M3 as bytes [R, D], and a byte for each block of a row: its power of two."""

    values: jax.Array
    scales: jax.Array


def wire_of(w_up: object, w_down: object) -> Wire:
    """As the recipe of the experts' weights quantises what has travelled, if that is lossless: one
    row a block, powers of two. To quantise it once more at its destination then changes nothing.
    """
    rules = [w.rule for w in (w_up, w_down) if isinstance(w, TrainedWeight) and w.rule]
    return wire_of_rules(*rules) if len(rules) == 2 else PLAIN


def wire_of_rules(up: Rule, down: Rule) -> Wire:
    """Of weights with these rules."""
    return Wire(_travels(up.input), _travels(down.grad_output))


def row_bytes(operand: Operand | None, width: int, itemsize: int) -> int:
    """Of a row of so many numbers on the wire."""
    if operand is None:
        return width * itemsize
    return width - (-width // operand.block[1])


def _travels(operand: Operand) -> Operand | None:
    by_row = operand.block is not None and operand.block[0] == 1
    return operand if by_row and (operand.fmt, operand.scale) == ("e4m3", "pow2") else None


def pack(x_RD: jax.Array, operand: Operand | None) -> jax.Array | Packed:
    """Rows as they travel."""
    if operand is None:
        return x_RD
    blocked = operand.quantize(x_RD)
    both = blocked.values, to_ue8m0(blocked.scales)
    return Packed(*(lax.bitcast_convert_type(x, jnp.uint8) for x in both))


def unpack(packed: jax.Array | Packed, operand: Operand | None, dtype: jnp.dtype) -> jax.Array:
    """Rows [R, D] in this dtype; a row of zero bytes is one of zeros."""
    if operand is None:
        return packed
    values = lax.bitcast_convert_type(packed.values, jnp.float8_e4m3fn)
    scales = from_ue8m0(packed.scales)
    return Blocked(values, scales, operand.block, operand.fmt).dequantize(dtype)
