"""What tensor cores make of a sum: an emulation of the FP8 accumulator of Hopper (report 3.3.2,
3.5.2), beside the definition that `fp8_gemm` computes.

Products of 32 elements of K are aligned at the largest exponent among them, cut to 14 bits and
added; the register that collects them holds 14 bits too. Every `interval` elements of K the
register is promoted: added to a sum in float32, with the blocks' scales, and cleared.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.config.fields import check
from dsv3_jax.quant.formats import format_of
from dsv3_jax.quant.fp8 import Blocked


@dataclass(frozen=True)
class Accumulator:
    """The hardware's sizes."""

    bits: int = 14
    """Kept of each summand, counted from the largest one's first bit, and of the register"""
    group: int = 32
    """Products that are aligned together"""
    interval: int | None = 128
    """N_C: elements of K between promotions; None for none"""
    aligned: bool = True
    """Whether the register takes part in the alignment of each group, or is added afterwards"""

    def __post_init__(self) -> None:
        check("group", self.group, self.group >= 1, "at least 1")
        most = 24 - self.group.bit_length()  # so that float32 holds a group's sum exactly
        check("bits", self.bits, 1 <= self.bits <= most, f"1 to {most} for group = {self.group}")
        if self.interval is not None:
            holds = self.interval >= 1 and self.interval % self.group == 0
            check("interval", self.interval, holds, f"multiples of group = {self.group}, or None")


def emulated_matmul(a_MK: jax.Array, b_KN: jax.Array, acc: Accumulator) -> jax.Array:
    """a [M, K] b [K, N] as the accumulator adds it up, float32 [M, N].

    Operands are float32 that hold numbers of 8-bit formats, so that their products are exact.
    """
    a_GMk, b_GkN = _in_groups(a_MK, acc.group), _in_groups(b_KN.T, acc.group).swapaxes(1, 2)
    groups = len(a_GMk)
    every = groups if acc.interval is None else acc.interval // acc.group

    def add(carry, group):
        register_MN, sum_MN = carry
        index, a_Mk, b_kN = group
        register_MN = _added(register_MN, a_Mk[:, :, None] * b_kN[None], acc)
        is_promoted = ((index + 1) % every == 0) | (index + 1 == groups)
        sum_MN = jnp.where(is_promoted, sum_MN + register_MN, sum_MN)
        return (jnp.where(is_promoted, 0, register_MN), sum_MN), None

    zeros = jnp.zeros((a_MK.shape[0], b_KN.shape[1]), jnp.float32)
    (_, sum_MN), _ = lax.scan(add, (zeros, zeros), (jnp.arange(groups), a_GMk, b_GkN))
    return sum_MN


def emulated_product(a: Blocked, b: Blocked, acc: Accumulator) -> jax.Array:
    """Fprop of a [M, K] in tiles 1xI and b [K, N] in blocks IxJ, float32 [M, N]: the register is
    promoted at the end of each I elements of K, where the scales change, or earlier.

    ValueError for blocks whose I differ.
    """
    if a.block[0] != 1 or a.block[1] != b.block[0]:
        raise ValueError(f"blocks are {a.block} and {b.block}; allowed: (1, I) and (I, J)")
    size, sum_MN = a.block[1], jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
    a_MK, b_KN = (format_of(x.fmt).decode(x.values) for x in (a, b))
    for i in range(a.scales.shape[1]):
        at = slice(i * size, (i + 1) * size)
        part_MN = emulated_matmul(a_MK[:, at], b_KN[at], acc)
        scale_N = jnp.repeat(b.scales[i], b.block[1])[: b.shape[1]]
        sum_MN += part_MN * a.scales[:, i, None] * scale_N[None]
    return sum_MN


def _in_groups(x_MK: jax.Array, group: int) -> jax.Array:
    """[G, M, k], filled up with zeros."""
    filled = jnp.pad(x_MK.astype(jnp.float32), ((0, 0), (0, -x_MK.shape[1] % group)))
    return filled.reshape(len(x_MK), -1, group).swapaxes(0, 1)


def _added(register_MN: jax.Array, product_MkN: jax.Array, acc: Accumulator) -> jax.Array:
    """The register after one group."""
    largest_MN = jnp.abs(product_MkN).max(1)
    if acc.aligned:
        largest_MN = jnp.maximum(largest_MN, jnp.abs(register_MN))
    # Numbers that share a last place; `Accumulator` sees to it that float32 holds their sum.
    sum_MN = _cut(product_MkN, largest_MN[:, None], acc.bits).sum(1)
    if acc.aligned:
        sum_MN += _cut(register_MN, largest_MN, acc.bits)
    else:
        sum_MN += register_MN
    return _cut(sum_MN, jnp.abs(sum_MN), acc.bits)


def _cut(x: jax.Array, largest: jax.Array, bits: int) -> jax.Array:
    """x towards 0 to the `bits` that begin with the first bit of `largest`."""
    exponent = lax.bitcast_convert_type(largest, jnp.int32) >> 23  # of 2^(exponent - 127)
    place = lax.bitcast_convert_type(jnp.maximum(exponent - bits + 1, 1) << 23, jnp.float32)
    return jnp.trunc(x / place) * place
