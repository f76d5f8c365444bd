"""What a forward pass keeps for the backward pass, in as few bytes as it takes."""

from dataclasses import dataclass, replace
from functools import partial

import jax

from dsv3_jax.quant.formats import from_ue8m0, pack12, to_ue8m0, unpack12
from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Operand


@partial(
    jax.tree_util.register_dataclass, data_fields=["blocked"], meta_fields=["operand", "columns"]
)
@dataclass(frozen=True)
class Kept:
    """A `Blocked` whose numbers of 12 bits are packed, two in three bytes, and whose powers of two
    are one byte each.
    """

    blocked: Blocked
    operand: Operand
    columns: int

    def values(self) -> jax.Array:
        """What was kept, as float32."""
        values, scales = self.blocked.values, self.blocked.scales
        if self.operand.fmt == "e5m6":
            values = unpack12(values, self.columns)
        if self.operand.scale != "float32":
            scales = from_ue8m0(scales)
        return replace(self.blocked, values=values, scales=scales).dequantize()


def keep(x_XD: jax.Array, operand: Operand) -> Kept:
    """x quantised as the operand says."""
    blocked = operand.quantize(x_XD)
    values, scales = blocked.values, blocked.scales
    if operand.fmt == "e5m6":
        values = pack12(values)
    if operand.scale != "float32":
        scales = to_ue8m0(scales)
    return Kept(replace(blocked, values=values, scales=scales), operand, x_XD.shape[-1])
