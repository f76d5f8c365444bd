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
        values, scales = self.values, self.scales
        if self.operand.fmt == "e5m6":
            values = unpack12(values, self.shape[-1])
        if self.operand.scale != "float32":
            scales = from_ue8m0(scales)
        block = self.operand.block or self.shape[-2:]
        return Blocked(values, scales, block, self.operand.fmt).dequantize()


def keep(x: jax.Array, operand: Operand) -> Kept:
    """x [..., X, D] quantised as the operand says."""
    blocked = operand.quantize(x)
    values, scales = blocked.values, blocked.scales
    if operand.fmt == "e5m6":
        values = pack12(values)
    if operand.scale != "float32":
        scales = to_ue8m0(scales)
    return Kept(values, scales, operand, x.shape)
