"""Gradients of weights from tiles of 128x1 along the tokens: Wgrad (report 3.3.2), summed over each
expert's blocks of rows.

    dW[e, d, f] = sum over e's blocks t of 128 tokens of
                      sx[t, d] sy[t, f]  (sum of the block's 128 products)

Operands lie with their tokens side by side, as tensor cores want E4M3. The inner sum is theirs, of
about 14 bits; the outer one is made in float32 registers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.kernels.walk import (
    BLOCK,
    OPERAND,
    ROWS,
    Sums,
    Walk,
    place,
    products,
    walked,
    warpgroup,
)

WALK = Walk(width=16)  # of 4, 8 and 16, the fastest for several experts


@partial(jax.jit, static_argnames="walk")
def multiply_columns(
    x_DT: jax.Array,
    s_tD: jax.Array,
    y_FT: jax.Array,
    s_tF: jax.Array,
    first_E: jax.Array,
    count_E: jax.Array,
    walk: Walk = WALK,
) -> jax.Array:
    """x [D, T] times the transpose of y [F, T], over each expert's tokens -> float32 [E, D, F].

    x and y are E4M3; scales float32 [T / 128, D] and [T / 128, F]. Expert e has `count_E[e]` blocks
    of 128 tokens from block `first_E[e]` on, int32; without any, its gradient is zero. D, F and T
    are multiples of 128.
    """
    (d, tokens), f = x_DT.shape, y_FT.shape[0]
    values = plgpu.BlockSpec((BLOCK, BLOCK), lambda t: (0, t), transforms=OPERAND)
    scales = plgpu.BlockSpec((1, BLOCK), lambda t: (t, 0))
    sums = Sums(walk, (values, scales, values, scales), jnp.float32)

    def body(x_DT: Any, s_tD: Any, y_FT: Any, s_tF: Any, first: Any, count: Any, out: Any) -> None:
        @partial(
            pl.run_scoped,
            **sums.allocations(x_DT, s_tD, y_FT, s_tF),
            collective_axes="warpgroup",
        )
        def _(copies: Any, tile: Any) -> None:
            tiles = d // BLOCK, f // BLOCK

            @plgpu.nd_loop((count.size, tiles[0] * tiles[1]), collective_axes="resident")
            def _(loop: plgpu.NDLoopInfo) -> None:
                expert = loop.index[0]
                m, n = place(loop.index[1], tiles, walk)
                rows, cols = pl.ds(m * BLOCK, BLOCK), pl.ds(n * BLOCK, BLOCK)
                # Slices as long as all tokens: what lies behind an expert's is never copied.
                blocks = pl.ds(first[expert], tokens // BLOCK)
                own_tokens = pl.ds(pl.multiple_of(first[expert] * BLOCK, BLOCK), tokens)
                operands = (
                    x_DT.at[rows, own_tokens],
                    s_tD.at[blocks, rows],
                    y_FT.at[cols, own_tokens],
                    s_tF.at[blocks, cols],
                )
                sums.write(_step, count[expert], operands, out.at[expert, rows, cols], copies, tile)

        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((count_E.size, d, f), jnp.float32)
    return walked(body, [x_DT, s_tD, y_FT, s_tF, first_E, count_E], out, walk)


def _step(_: Any, x: Any, s_D: Any, y: Any, s_F: Any, total: jax.Array) -> jax.Array:
    _, own_rows = warpgroup()

    def scaling() -> Any:
        down = plgpu.load(s_D.at[0, own_rows], layout=plgpu.Layout.WGMMA.reduce(1))
        along = plgpu.load(s_F.at[0], layout=plgpu.Layout.WGMMA.reduce(0))
        down, along = (
            lax.broadcast_in_dim(scale, (ROWS, BLOCK), [axis])
            for axis, scale in enumerate((down, along))
        )
        scale = down * along
        return lambda part: part * scale

    return total + products(x.at[own_rows], y, scaling)
