"""Sums of products of FP8 blocks, promoted to float32 and scaled every 128 of the inner size.

A thread has 64 float32 registers for a block's products and 64 for their sum. One warpgroup's
promotion (64 operations a thread) hides behind the other's products (4 instructions of `wgmma`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.kernels.ring import Part, Ring
from dsv3_jax.quant.kernels.tiles import BLOCK, E4M3, swizzled
from dsv3_jax.quant.kernels.walk import ROWS, own_rows

VALUES = Part((BLOCK, BLOCK), E4M3, swizzled(E4M3))
SCALES = Part((BLOCK,), jnp.float32)


def promoted(
    ring: Ring,
    first: jax.Array,
    blocks: int | jax.Array,
    scales: Callable[..., tuple],
    factors: Callable[..., jax.Array],
) -> jax.Array:
    """Sum over blocks of a b^T, of this warpgroup's rows, times `factors(*scales(k, *refs))`.

    The ring's parts are a, b, VALUES both, and any number of SCALES, the `refs`; `scales` reads
    what takes few registers, `factors` makes of it float32 [64, 128].
    """

    own = own_rows()

    def scales_of(k: jax.Array | int, count: jax.Array) -> tuple:
        return scales(k, *ring.block(count)[2:])

    def block(k: jax.Array, carry: tuple) -> tuple:
        count, total, own_scales = carry
        a, b, *_ = ring.block(count)

        def summed(products: Any) -> tuple:
            plgpu.wgmma(products, a.at[own], b.transpose((1, 0)))
            factor = factors(*own_scales)
            # The next block's scales are read now, while the tensor cores are at work. They take
            # most of what shared memory gives, and a read that somebody waits for would keep the
            # next products waiting. Behind the last block: the same again.
            more = k + 1 < blocks
            pl.when(more)(lambda: ring.wait(count + 1))
            ahead = more.astype(jnp.int32)
            following = scales_of(k + ahead, count + ahead)
            return total + products[...] * factor, following  # [...] waits for the products

        total, own_scales = pl.run_scoped(summed, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        ring.release(count)
        return count + 1, total, own_scales

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
    pl.when(blocks > 0)(lambda: ring.wait(first))
    return lax.fori_loop(0, blocks, block, (first, zeros, scales_of(0, first)))[1]


def down(scales_R: Any) -> jax.Array:
    """Scales of this warpgroup's rows, from shared memory."""
    return plgpu.load(scales_R.at[own_rows()], layout=plgpu.Layout.WGMMA.reduce(1))


def along(scales_C: Any) -> jax.Array:
    """Scales of a tile's columns."""
    return plgpu.load(scales_C, layout=plgpu.Layout.WGMMA.reduce(0))


def spread(scales: jax.Array, axis: int) -> jax.Array:
    """Scales of rows (axis 0) or columns (1) -> each element's of a warpgroup's products."""
    return lax.broadcast_in_dim(scales, (ROWS, BLOCK), [axis])
