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
    data_fields=["blocked", "slot", "taps"],
    meta_fields=["rule", "measure"],
)
@dataclass(frozen=True)
class TrainedWeight:
    """Stands in a model where a weight [..., D, F] does: linears multiply with `blocked` by `rule`.

    Behaves as an array of that shape where layers handle weights, as `Blocked` does.
    """

    blocked: Blocked
    slot: jax.Array
    """[..., D, F], never read: its gradient is the weight's. Usually the master weight"""
    rule: Rule
    taps: tuple[jax.Array, jax.Array] | None = None
    """Zeros, never read: their gradients are what `measure` finds in the input and in the output's
    gradient"""
    measure: Measure | None = None

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
        taps = self.taps and tuple(tap[index] for tap in self.taps)
        return replace(self, blocked=self.blocked[index], slot=self.slot[index], taps=taps)
