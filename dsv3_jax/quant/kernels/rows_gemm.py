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

WALK = Walk(width=8)  # of 4, 8 and 16, which all were within 3 %


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
    (tokens, inner), columns = a_TK.shape, b_ENK.shape[1]
    specs = (
        plgpu.BlockSpec((BLOCK, BLOCK), lambda k: (0, k), transforms=OPERAND),
        plgpu.BlockSpec((1, BLOCK), lambda k: (k, 0)),
        plgpu.BlockSpec((BLOCK, BLOCK), lambda k: (0, k), transforms=OPERAND),
    )
    sums = Sums(walk, specs, dtype)

    def body(a_TK: Any, s_kT: Any, b_ENK: Any, s_Enk: Any, expert_x: Any, out_TN: Any) -> None:
        @partial(
            pl.run_scoped,
            **sums.allocations(a_TK, s_kT, b_ENK.at[0]),
            collective_axes="warpgroup",
        )
        def _(copies: Any, tile: Any) -> None:
            tiles = tokens // BLOCK, columns // BLOCK

            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="resident")
            def _(loop: plgpu.NDLoopInfo) -> None:
                m, n = place(loop.index[0], tiles, walk)
                rows, cols = pl.ds(m * BLOCK, BLOCK), pl.ds(n * BLOCK, BLOCK)
                expert = expert_x[lax.div(m * BLOCK, tokens // expert_x.size)]

                def step(index: Any, a: Any, s: Any, b: Any, total: jax.Array) -> jax.Array:
                    _, own_rows = warpgroup()

                    def scaling() -> Any:
                        down = plgpu.Layout.WGMMA.reduce(1)
                        scale = plgpu.load(s.at[0, own_rows], layout=down)
                        scale = scale * s_Enk[expert, n, index[0]]
                        return lambda part: part * lax.broadcast_in_dim(scale, (ROWS, BLOCK), [0])

                    return total + products(a.at[own_rows], b, scaling)

                operands = a_TK.at[rows], s_kT.at[:, rows], b_ENK.at[expert].at[cols]
                out = out_TN.at[rows, cols]
                sums.write(step, inner // BLOCK, operands, out, copies, tile)

        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((tokens, columns), dtype)
    return walked(body, [a_TK, s_kT, b_ENK, s_Enk, expert_x], out, walk)
