"""What a forward pass keeps for the backward pass, in as few bytes as it takes."""

from dataclasses import dataclass
from functools import partial

import jax

from dsv3_jax.quant.formats import from_ue8m0, pack12, to_ue8m0, unpack12
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Operand


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["operand", "shape"],
)
@dataclass(frozen=True)
class Kept:
    """Numbers of 12 bits are packed, two in three bytes; powers of two are one byte each."""

    values: jax.Array
    scales: jax.Array
    operand: Operand
    shape: tuple[int, ...]

    def dequantize(self) -> jax.Array:
        """What was kept, float32 [..., X, D]."""
        values = self.values
        if self.operand.fmt == "e5m6":
            values = unpack12(values, self.shape[-1])
        block = self.operand.block or self.shape[-2:]
        return Blocked(values, self.float_scales, block, self.operand.fmt).dequantize()

    @property
    def float_scales(self) -> jax.Array:
        """As `Blocked` has them."""
        return self.scales if self.operand.scale == "float32" else from_ue8m0(self.scales)


def keep(x: jax.Array, operand: Operand) -> Kept:
    """x [..., X, D] quantised as the operand says."""
    blocked = operand.quantize(x)
    values = pack12(blocked.values) if operand.fmt == "e5m6" else blocked.values
    return kept_as(operand, values, blocked.scales, x.shape)


def kept_as(operand: Operand, values: jax.Array, scales: jax.Array, shape: tuple[int, ...]) -> Kept:
    """Values as they are stored, and their scales in float32."""
    if operand.scale != "float32":
        scales = to_ue8m0(scales)
    return Kept(values, scales, operand, shape)
