"""Products of rows in tiles of 1x128 with weights in blocks of 128x128: Fprop and Dgrad (report
3.3.2), dense, or grouped over blocks of rows of one expert each.

    Y[t, n] = sum over blocks k of  s[k, t] w[n / 128, k]  (sum of the block's 128 products)

The inner sum is the tensor cores', of about 14 bits; the outer one is made in float32 registers.
The kernel copies no weight: a tile of the output finds its expert's in place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsv3_jax.quant.kernels.sums import SCALES, VALUES, down, promoted, spread
from dsv3_jax.quant.kernels.tiles import BLOCK
from dsv3_jax.quant.kernels.walk import WALK, Tile, Walk, owner, place, resident, walked

LEAST_BLOCKS = 4
"""Of the inner size that each of its parts has: fewer are summed as fast as the parts' outputs"""


@partial(jax.jit, static_argnames=("dtype", "walk"))
def multiply_rows(
    a_TK: jax.Array,
    s_kT: jax.Array,
    b_ENK: jax.Array,
    s_Enk: jax.Array,
    expert_x: jax.Array,
    dtype: jnp.dtype,
    walk: Walk = WALK,
) -> jax.Array:
    """a [T, K] times the transpose of each block's expert's b [N, K] -> [T, N] in `dtype`, bfloat16
    or float32.

    a and b are E4M3; scales float32, of a [K / 128, T], of b [E, N / 128, K / 128]. expert_x int32
    [x] names the expert of each of x equal blocks of rows, multiples of 128. N and K are multiples
    of 128 as well.
    """
    (tokens, inner), width = a_TK.shape, b_ENK.shape[1]
    tiles = tokens // BLOCK, width // BLOCK
    splits = _splits(tiles[0] * tiles[1], inner // BLOCK, resident(walk))
    blocks = inner // BLOCK // splits

    def tile_of(
        a_TK: Any,
        s_kT: Any,
        b_ENK: Any,
        s_Enk: Any,
        expert_x: Any,
        out_STN: Any,
        split: jax.Array,
        index: jax.Array,
    ) -> Tile:
        m, n, rows, columns = place(index, tiles, walk)
        expert, first = owner(expert_x, tokens, m), split * blocks

        def parts(k: jax.Array) -> tuple:
            within = pl.ds((first + k) * BLOCK, BLOCK)
            return (
                a_TK.at[rows, within],
                b_ENK.at[expert, columns, within],
                s_kT.at[first + k, rows],
            )

        total = partial(
            promoted,
            scales=lambda k, s_R: (down(s_R), s_Enk[expert, n, first + k]),
            factors=lambda s_R, of_block: spread(s_R * of_block, 0),
        )
        return Tile(out_STN.at[split, rows, columns], blocks, parts, total)

    out = jax.ShapeDtypeStruct((splits, tokens, width), jnp.float32 if splits > 1 else dtype)
    y_STN = walked(
        tile_of,
        (splits, tiles[0] * tiles[1]),
        [a_TK, s_kT, b_ENK, s_Enk, expert_x],
        (VALUES, VALUES, SCALES),
        out,
        BLOCK,
        walk,
    )
    return y_STN.sum(0).astype(dtype) if splits > 1 else y_STN[0]


def _splits(tiles: int, blocks: int, resident: int) -> int:
    """Parts of the inner size, each with an output of its own, so that few tiles keep more
    multiprocessors busy. GPUs with another number of them round such products in another order.
    """
    most = max(1, min(resident // tiles, blocks // LEAST_BLOCKS))
    return max(parts for parts in range(1, most + 1) if blocks % parts == 0)
