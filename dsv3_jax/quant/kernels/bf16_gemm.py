"""Grouped products in bfloat16: blocks of rows of one expert each times that expert's weight, and
the weights' gradients, where no recipe rounds to FP8 (`quant.gemm`).

    Fprop   Y[t] = X[t] W[e]        of the expert e of each block of rows
    Dgrad   dX[t] = dY[t] W[e]^T
    Wgrad   dW[e] = sum over e's rows of X[t]^T dY[t]

No weight is copied and nothing transposed: tensor cores take bfloat16 with either dimension last.
They sum in float32 over the whole inner size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.expert_rows import blocks_of_experts
from dsv3_jax.quant.kernels.ring import Part, Ring
from dsv3_jax.quant.kernels.tiles import BLOCK, swizzled
from dsv3_jax.quant.kernels.walk import (
    ROWS,
    WALK,
    Tile,
    Walk,
    own_rows,
    owner,
    place,
    walked,
    walked_by_expert,
)

INNER = 64
"""Of a stage: 128 bytes"""
WIDE = 256
"""Columns of a tile, if there are so many: each number in shared memory is used more often"""


def _part(*shape: int) -> Part:
    return Part(shape, jnp.bfloat16, swizzled(jnp.bfloat16))


@partial(jax.jit, static_argnames=("transposed", "walk"))
def multiply_blocks(
    x_TK: jax.Array,
    w_EKN: jax.Array,
    expert_x: jax.Array,
    transposed: bool = False,
    walk: Walk = WALK,
) -> jax.Array:
    """x [T, K] times each block's expert's weight [K, N] -> bfloat16 [T, N].

    Weights [E, K, N] are [E, N, K] if `transposed`. expert_x int32 [x] names the expert of each of
    x equal blocks of rows, multiples of 128. K and N are multiples of 128 too.
    """
    (tokens, inner), outer = x_TK.shape, w_EKN.shape[1 if transposed else 2]
    width = BLOCK if outer % WIDE else WIDE
    tiles = tokens // BLOCK, outer // width

    def tile_of(x_TK: Any, w_EKN: Any, expert_x: Any, out_TN: Any, index: jax.Array) -> Tile:
        m, _, rows, columns = place(index, tiles, walk, width)
        expert = owner(expert_x, tokens, m)

        def parts(k: jax.Array) -> tuple:
            within = pl.ds(k * INNER, INNER)
            place_of_w = (columns, within) if transposed else (within, columns)
            return x_TK.at[rows, within], w_EKN.at[expert, *place_of_w]

        def product(sums: Any, x: Any, w: Any) -> None:
            plgpu.wgmma(sums, x.at[own_rows()], w.transpose((1, 0)) if transposed else w)

        total = partial(_total, width=width, product=product)
        return Tile(out_TN.at[rows, columns], inner // INNER, parts, total)

    return walked(
        tile_of,
        (tiles[0] * tiles[1],),
        [x_TK, w_EKN, expert_x],
        (_part(BLOCK, INNER), _part(width, INNER) if transposed else _part(INNER, width)),
        jax.ShapeDtypeStruct((tokens, outer), jnp.bfloat16),
        width,
        walk,
    )


@partial(jax.jit, static_argnames=("experts", "walk"))
def sum_blocks(
    x_TD: jax.Array, y_TF: jax.Array, expert_x: jax.Array, experts: int, walk: Walk = WALK
) -> jax.Array:
    """The transpose of x [T, D] times y [T, F], over each expert's rows -> float32 [E, D, F].

    expert_x int32 [x] names the expert of each of x equal blocks of rows, multiples of 128, in
    ascending order; an expert without any has a gradient of zero. D and F are multiples of 128.
    """

    def sources(x_TD: Any, y_TF: Any, t: jax.Array, rows: Any, columns: Any) -> tuple:
        tokens = pl.ds(t * INNER, INNER)
        return x_TD.at[tokens, rows], y_TF.at[tokens, columns]

    def product(sums: Any, x: Any, y: Any) -> None:
        plgpu.wgmma(sums, x.at[:, own_rows()].transpose((1, 0)), y)  # rows of the output

    return walked_by_expert(
        sources,
        partial(_total, width=BLOCK, product=product),
        [x_TD, y_TF],
        blocks_of_experts(expert_x, experts, len(x_TD) // INNER),
        (_part(INNER, BLOCK), _part(INNER, BLOCK)),
        (x_TD.shape[1], y_TF.shape[1]),
        walk,
    )


def _total(
    ring: Ring,
    first: jax.Array,
    blocks: int | jax.Array,
    width: int,
    product: Callable[..., None],
) -> jax.Array:
    """Sum over blocks of this warpgroup's products, `product(sums, *parts)` adding one."""

    def within(sums: Any) -> jax.Array:
        def block(k: jax.Array, count: jax.Array) -> jax.Array:
            ring.wait(count)
            product(sums, *ring.block(count))
            plgpu.wgmma_wait(1)  # the products before these are done with their block
            pl.when(k > 0)(lambda: ring.release(count - 1))
            return count + 1

        count = lax.fori_loop(0, blocks, block, first)
        total = sums[...]
        pl.when(blocks > 0)(lambda: ring.release(count - 1))
        return total

    return pl.run_scoped(within, plgpu.ACC((ROWS, width), jnp.float32))
