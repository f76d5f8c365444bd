"""Weights' gradients put off: what a backward pass leaves for them, and the products themselves
(report 3.2.1, where the backward pass of a chunk is split for inputs and for weights).

A `Slot` stands where a weight's gradient would go. A product's derivative rule then leaves its own
operands there, x and dy of Wgrad, in as few bytes as they are kept in; one product for each linear
makes the gradient of them later, with `Entry.gradients`. Operands leave through a cotangent, since
the backward pass has them at hand, recomputed or not. A cotangent is of floats: whatever else there
is (FP8, packed formats, ids of experts) travels as bits in float32, which are moved and never
computed with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.quant.expert_rows import parted


@dataclass(frozen=True)
class Entry:
    """What one product leaves: that of one linear, or of several side by side."""

    names: tuple[str, ...]
    """Of its weights"""
    widths: tuple[int, ...]
    gradient: Callable[..., jax.Array]
    """Of all weights side by side, from the operands"""
    operands: tuple[Any, ...]
    """Their shapes and dtypes"""

    @property
    def zeros(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a slot for them is made of."""
        return jax.eval_shape(_packed, self.operands)

    def gradients(self, left: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """Of each weight by its name, in the dtype of the product."""
        dw = self.gradient(*_unpacked(left, self.operands))
        parts = parted(dw, self.widths, [dw.dtype] * len(self.widths))
        return dict(zip(self.names, parts, strict=True))


@dataclass(eq=False)
class Tape:
    """The entries of a pass, by the name of each product's first weight; noted while it is traced.

    Two tapes are never equal: a traced function that holds one is traced anew for another.
    """

    entries: dict[str, Entry] = field(default_factory=dict)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left"],
    meta_fields=["name", "tape", "dtype"],
)
@dataclass(frozen=True)
class Slot:
    """Where a product leaves its operands, instead of its weight's gradient."""

    left: tuple[jax.Array, ...]
    """Zeros, never read, whose gradient they are; nothing while the tape is being noted, and for
    all but the first of weights side by side"""
    name: str
    tape: Tape
    dtype: jnp.dtype
    """The gradient's"""

    def __getitem__(self, index: Any) -> "Slot":
        return replace(self, left=tuple(x[index] for x in self.left))


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["dtype"])
@dataclass(frozen=True)
class _Place:
    """Of a gradient of this dtype."""

    dtype: jnp.dtype


def hollow(slots: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a backward pass needs to know of slots, and not their zeros."""
    return tuple(
        replace(slot, left=()) if isinstance(slot, Slot) else _Place(slot.dtype) for slot in slots
    )


def is_put_off(slots: tuple[Any, ...]) -> bool:
    """Whether a product is to leave its operands."""
    return isinstance(slots[0], Slot)


def note(
    slots: tuple[Any, ...],
    widths: tuple[int, ...],
    gradient: Callable[..., jax.Array],
    operands: tuple[Any, ...],
) -> None:
    """Of a product that is being traced: what it will leave, if it has a slot."""
    if is_put_off(slots):
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
        names = tuple(slot.name for slot in slots)
        slots[0].tape.entries[names[0]] = Entry(names, widths, gradient, structs)


def cotangents(
    slots: tuple[Any, ...],
    widths: tuple[int, ...],
    gradient: Callable[..., jax.Array],
    operands: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Of the places that weights' gradients go to, `hollow`: operands for slots, else gradients."""
    if is_put_off(slots):
        return (replace(slots[0], left=_packed(operands)), *slots[1:])
    return parted(gradient(*operands), widths, [slot.dtype for slot in slots])


def _packed(operands: Any) -> tuple[jax.Array, ...]:
    return tuple(x if _travels(x) else _bits(x) for x in jax.tree.leaves(operands))


def _unpacked(left: tuple[jax.Array, ...], structs: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(structs)
    pairs = zip(left, leaves, strict=True)
    return jax.tree.unflatten(
        tree, [x if _travels(like) else _from_bits(x, like) for x, like in pairs]
    )


def _travels(x: Any) -> bool:
    """Whether it can be a cotangent, and no compiler widens it on the way."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1


def _bits(x: jax.Array) -> jax.Array:
    """Any array as float32 [n]."""
    byte = lax.bitcast_convert_type(x, jnp.uint8).reshape(-1)
    return lax.bitcast_convert_type(jnp.pad(byte, (0, -byte.size % 4)).reshape(-1, 4), jnp.float32)


def _from_bits(bits: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    byte = lax.bitcast_convert_type(bits, jnp.uint8).reshape(-1)
    size = like.dtype.itemsize
    byte = byte[: math.prod(like.shape) * size]
    shape = like.shape if size == 1 else (*like.shape, size)
    return lax.bitcast_convert_type(byte.reshape(shape), like.dtype)
