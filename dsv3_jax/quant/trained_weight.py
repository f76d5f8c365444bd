"""A weight that was quantised once for a whole step, and the place its gradient goes to."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.quant.fp8 import Blocked
from dsv3_jax.quant.recipes import Operand, Rule

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
    data_fields=["blocked", "slot", "taps"],
    meta_fields=["rule"],
)
@dataclass(frozen=True)
class TrainedWeight:
    """Stands in a model where a weight [..., D, F] does: linears multiply with `blocked` by `rule`.

    As with an array, `w[...]` is itself and `w[i]` indexes leading dimensions.
    """

    blocked: Blocked
    slot: jax.Array
    """[..., D, F], never read: its gradient is the weight's. Usually the master weight"""
    rule: Rule
    taps: Taps | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.blocked.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The gradient's."""
        return self.slot.dtype

    def __getitem__(self, index: Any) -> "TrainedWeight":
        if index is Ellipsis:
            return self
        taps = jax.tree.map(lambda tap: tap[index], self.taps)
        return replace(self, blocked=self.blocked[index], slot=self.slot[index], taps=taps)
