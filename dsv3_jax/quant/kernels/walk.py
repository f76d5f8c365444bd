"""How the GEMM kernels share out their work: blocks of the grid, one resident on each
multiprocessor, that walk over tiles of the output. In each two warpgroups multiply and one copies.

A tile has 128 rows, of which each multiplying warpgroup has 64. Copies run on from tile to tile:
the next one's operands come while this one's products are summed up and written, and nothing but
the copies ties the two warpgroups together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant.kernels.ring import Part, Ring
from dsv3_jax.quant.kernels.tiles import BLOCK, launched, swizzled

WARPGROUPS = 2
ROWS = BLOCK // WARPGROUPS  # of one warpgroup: those of one `wgmma`
_SHARED_BYTES = 226 * 1024  # of 227 that a block can have; the rest is for barriers
# Of 65,536 in all for three times 128 threads: 2 x 240 + 24 of 512. Wgrad in FP8 takes 238.
_COPIER_REGISTERS, _MULTIPLIER_REGISTERS = 24, 240


@dataclass(frozen=True)
class Walk:
    """What was chosen by timing (benchmarks/README.md)."""

    width: int = 8
    """Rows of tiles that are walked together, so that their operands stay in the L2"""
    stages: int = 4
    """At most so many blocks' operands in shared memory; at least 2"""
    multiprocessors: int | None = None
    """That have a block of the grid; None: all of the device's"""


WALK = Walk()


@dataclass(frozen=True)
class Tile:
    """A tile of the output, and what it is summed from."""

    out: Any
    blocks: int | jax.Array
    """Of the inner size"""
    parts: Callable[[jax.Array], Sequence[Any]]
    """Block -> where its copies come from"""
    total: Callable[[Ring, jax.Array, int | jax.Array], jax.Array]
    """(ring, number of the first block there, blocks) -> this warpgroup's rows of the sum over all
    blocks, float32 [64, width]. Each block is released once it has been used"""


class Place(NamedTuple):
    """Of a tile in the output."""

    m: jax.Array
    n: jax.Array
    """Its row and column among the tiles"""
    rows: Any
    columns: Any
    """Slices of the output"""


def place(index: jax.Array, tiles: tuple[int, int], walk: Walk, width: int = BLOCK) -> Place:
    """The tile that comes at this place of the walk over rows x columns tiles [128, width]."""
    m, n = plgpu.planar_snake(index, tiles, 0, walk.width)
    return Place(m, n, pl.ds(m * BLOCK, BLOCK), pl.ds(n * width, width))


def owner(expert_x: Any, tokens: int, m: jax.Array) -> jax.Array:
    """Expert of a tile's rows: of `tokens` in all each expert of expert_x has an equal block."""
    return expert_x[lax.div(m * BLOCK, tokens // expert_x.size)]


def own_rows() -> Any:
    """Of a tile, those of this warpgroup."""
    return pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)


def resident(walk: Walk) -> int:
    """Blocks of the grid: one on each multiprocessor of the device; where kernels are lowered
    without one, of an H100 or H200 (SXM).
    """
    return walk.multiprocessors or getattr(jax.local_devices()[0], "core_count", 132)


def walked(
    tile_of: Callable[..., Tile],
    grid: Sequence[int],
    arrays: Sequence[jax.Array],
    parts: Sequence[Part],
    out: jax.ShapeDtypeStruct,
    width: int,
    walk: Walk,
) -> jax.Array:
    """What resident blocks write: the tiles [128, width] that `tile_of(*inputs, output, *index)`
    describes for each index of a grid. A stage holds `parts`.
    """
    held = Part((WARPGROUPS, ROWS, width), out.dtype, swizzled(out.dtype))
    stages = min(walk.stages, (_SHARED_BYTES - held.nbytes) // sum(part.nbytes for part in parts))
    assert stages > 1, f"{stages} stage(s): readers hold one block while they wait for the next"

    def body(*refs: Any) -> None:
        @partial(
            pl.run_scoped,
            held=plgpu.SMEM(held.shape, held.dtype, transforms=held.transforms),
            **Ring.allocations(parts, stages, WARPGROUPS),
            collective_axes="warpgroup",
        )
        def _(held: Any, **ring: Any) -> None:
            each = plgpu.nd_loop(grid, collective_axes="resident", init_carry=jnp.int32(0))
            lax.cond(
                lax.axis_index("warpgroup") < WARPGROUPS,
                lambda: _multiply(each, partial(tile_of, *refs), Ring(**ring), held),
                lambda: _copy(each, partial(tile_of, *refs), Ring(**ring)),
            )

    (y,) = launched(
        body,
        arrays,
        [out],
        grid=(resident(walk),),
        grid_names=("resident",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
    )
    return y


def walked_by_expert(
    sources: Callable[..., Sequence[Any]],
    total: Callable[..., jax.Array],
    operands: Sequence[jax.Array],
    owned: tuple[jax.Array, jax.Array],
    parts: Sequence[Part],
    shape: tuple[int, int],
    walk: Walk,
) -> jax.Array:
    """Sums over each expert's own blocks -> float32 [E, D, F] of this shape [D, F].

    `owned` are each expert's first block and their count, int32 [E]; a block's copies come from
    `sources(*operands, block, rows, columns)`; `total` is a tile's.
    """
    first_E, count_E = owned
    tiles = shape[0] // BLOCK, shape[1] // BLOCK

    def tile_of(*args: Any) -> Tile:
        *refs, first, count, out, expert, index = args
        *_, rows, columns = place(index, tiles, walk)
        start = first[expert]  # once: read before each copy, it would hold all of them up

        def parts_of(k: jax.Array) -> Sequence[Any]:
            return sources(*refs, start + k, rows, columns)

        return Tile(out.at[expert, rows, columns], count[expert], parts_of, total)

    grid, arrays = (count_E.size, tiles[0] * tiles[1]), [*operands, first_E, count_E]
    out = jax.ShapeDtypeStruct((count_E.size, *shape), jnp.float32)
    return walked(tile_of, grid, arrays, parts, out, BLOCK, walk)


def _copy(each_tile: Callable, tile_at: Callable[..., Tile], ring: Ring) -> None:
    plgpu.set_max_registers(_COPIER_REGISTERS, action="decrease")

    @each_tile
    def copied(loop: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
        tile = tile_at(*loop.index)

        def block(k: jax.Array, count: jax.Array) -> jax.Array:
            ring.fill(count, tile.parts(k))
            return count + 1

        return lax.fori_loop(0, tile.blocks, block, carry)

    ring.drain(copied)


def _multiply(each_tile: Callable, tile_at: Callable[..., Tile], ring: Ring, held: Any) -> None:
    plgpu.set_max_registers(_MULTIPLIER_REGISTERS, action="increase")
    own, rows = lax.axis_index("warpgroup"), own_rows()

    @each_tile
    def _(loop: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
        tile = tile_at(*loop.index)
        total = tile.total(ring, carry, tile.blocks)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
        held[own] = total.astype(held.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(held.at[own], tile.out.at[rows])
        return carry + tile.blocks

    plgpu.wait_smem_to_gmem(0)
