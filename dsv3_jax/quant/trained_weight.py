"""A weight as a step computes with it, and the place its gradient goes to."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Operand, Rule
from dsv3_jax.quant.tape import Slot

Measure = Callable[[jax.Array, Operand], jax.Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input", "grad_output"],
    meta_fields=["measure"],
)
@dataclass(frozen=True)
class Taps:
    """Zeros, never read: their gradients are what `measure` finds in a linear's input and in its
    output's gradient, [x, M, D] and [x, M, F] (groups of rows), before they are rounded.
    """

    input: jax.Array
    grad_output: jax.Array
    measure: Measure


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "slot", "taps", "overflow"],
    meta_fields=["rule"],
)
@dataclass(frozen=True)
class TrainedWeight:
    """Stands in a model where a weight [..., D, F] does: linears multiply with `value`, and its
    gradient goes to `slot`.

    As with an array, `w[...]` is itself and `w[i]` indexes leading dimensions.
    """

    value: Blocked | jax.Array
    """Quantised once for a whole step, or in the dtype of activations"""
    slot: jax.Array | Slot
    """[..., D, F], never read: usually the master weight. Or a `Slot` for what makes the gradient
    """
    rule: Rule | None = None
    """How a linear rounds its operands; None if `value` is an array"""
    taps: Taps | None = None
    overflow: jax.Array | None = None
    """As a slot [..., D, F], beside a `Slot`: for products that are not put off"""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The gradient's."""
        return self.slot.dtype

    def __getitem__(self, index: Any) -> "TrainedWeight":
        if index is Ellipsis:
            return self
        taps, overflow = jax.tree.map(lambda x: x[index], (self.taps, self.overflow))
        slot, value = self.slot[index], self.value[index]
        return replace(self, value=value, slot=slot, taps=taps, overflow=overflow)


def split_trained(weight: Any) -> tuple[Any, Any]:
    """What of a linear's weight gradients go to, and the rest; a `Blocked` alone has none."""
    if isinstance(weight, TrainedWeight):
        return (weight.slot, weight.taps), replace(weight, slot=None, taps=None)
    return ((), weight) if isinstance(weight, Blocked) else (weight, None)


def joined_trained(trained: Any, fixed: Any) -> Any:
    """`split_trained` undone."""
    if isinstance(fixed, TrainedWeight):
        slot, taps = trained
        return replace(fixed, slot=slot, taps=taps)
    return trained if fixed is None else fixed


def off_tape(weight: Any) -> Any:
    """A weight whose gradient goes to its `overflow`, if it has one."""
    if isinstance(weight, TrainedWeight) and weight.overflow is not None:
        return replace(weight, slot=weight.overflow, overflow=None)
    return weight
