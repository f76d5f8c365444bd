"""Cases of gpu_gemm.py: what multiplies or quantises, its inputs, and what checks its output.

A case is a list of variants that do the same work; its inputs are made when it is called.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.quant import fp8
from dsv3_jax.quant.kernels import bf16_gemm, rows_gemm, wgrad_gemm
from dsv3_jax.quant.kernels import quantize as passes
from dsv3_jax.quant.kernels.swiglu import swiglu_columns, swiglu_rows
from dsv3_jax.quant.kernels.walk import WALK
from dsv3_jax.quant.kernels.weights import quantize_weight
from dsv3_jax.quant.swiglu import swiglu

BLOCK = 128
SETS_BYTES = 150e6  # of a variant's inputs together: three times the L2
FEW_ELEMENTS = 1e6  # that nobody times: one set
MOST_SETS = 8
ERROR, DIFF = 4e-3, 1e-3  # allowed; rounding to bfloat16 alone is an error of 1.7e-3
# Of SwiGLU's bytes: in its exponential function each compiler has last bits of its own.
BYTES = 0.01

Sets = Sequence[tuple]
Errors = dict[str, float]


@dataclass(frozen=True)
class Variant:
    """One of those that take turns."""

    name: str
    run: Callable[..., Any]
    sets: Sets
    """Of inputs"""
    work: float
    """FLOPs of a product, bytes that a pass reads and writes"""
    check: Callable[[Any], Errors] | None = None
    """Output of the first set -> how far off it is, and whether that is `wrong`"""


# --- products ---


def rows_case(multiprocessors: int | None, experts: int, m: int, n: int, k: int) -> list[Variant]:
    """Weights of K x N for M rows of each expert, as in Fprop. N is filled up to whole blocks
    beforehand, and what that adds is cut away in the time.
    """
    walk = replace(WALK, multiprocessors=multiprocessors)
    expert_x = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), m // BLOCK)

    def operands(x, w_EKN):
        filled_ENK = jnp.pad(w_EKN.swapaxes(1, 2), [(0, 0), (0, -n % BLOCK), (0, 0)])
        w = fp8.quantize(filled_ENK, (BLOCK, BLOCK))
        return *rows_of(x), w.values, w.scales, expert_x

    def kernel(*operands):
        return rows_gemm.multiply_rows(*operands, jnp.bfloat16, walk)[:, :n]

    def exact(x, w):
        x, w = (each.astype(jnp.float32) for each in (x.reshape(experts, m, k), w))
        return jnp.einsum("emk,ekn->emn", x, w, precision="highest").reshape(-1, n)

    def exact_of_fp8(a, s, w, s_w, _):
        w_EKN = fp8.Blocked(w, s_w).dequantize().swapaxes(1, 2)
        return exact(dequantized(a, s), w_EKN[..., :n])

    def bf16(x, w):
        return jnp.einsum("emk,ekn->emn", x.reshape(experts, m, k), w)

    def own_bf16(x, w):
        return bf16_gemm.multiply_blocks(x, w, expert_x, walk=walk)

    sets, flops = draws((experts * m, k), (experts, k, n)), 2 * experts * m * n * k
    found = products(sets, operands, kernel, bf16, exact_of_fp8, flops)
    if experts > 1:
        found.append(Variant("bf16 by kernel", own_bf16, sets, flops, close_to(exact, sets)))
    return found


def wgrad_case(multiprocessors: int | None, d: int, f: int, blocks: Sequence[int]) -> list[Variant]:
    """dW [D, F] of experts that have so many blocks of 128 tokens. XLA's side has the same tokens
    in equal parts, for the experts that have any.
    """
    walk = replace(wgrad_gemm.WALK, multiprocessors=multiprocessors)
    tokens, used = sum(blocks) * BLOCK, sum(map(bool, blocks))
    ends, owners = np.cumsum(blocks), np.repeat(np.arange(len(blocks)), blocks)
    expert_x = jnp.asarray(owners, jnp.int32)
    first, count = (jnp.asarray(each, jnp.int32) for each in (ends - blocks, blocks))

    def operands(x, y):
        return *columns_of(x), *columns_of(y), first, count

    def kernel(*operands):
        return wgrad_gemm.multiply_columns(*operands, walk)

    def exact(x, y):
        parts = [slice((e - b) * BLOCK, e * BLOCK) for e, b in zip(ends, blocks, strict=True)]
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        each = [jnp.einsum("td,tf->df", x[p], y[p], precision="highest") for p in parts]
        return jnp.stack(each)

    def exact_of_fp8(x, s_x, y, s_y, *_):
        return exact(dequantized(x, s_x).T, dequantized(y, s_y).T)

    def bf16(x, y):
        x, y = x.reshape(used, -1, d), y.reshape(used, -1, f)
        return jnp.einsum("etd,etf->edf", x, y, preferred_element_type=jnp.float32)

    def own_bf16(x, y):
        return bf16_gemm.sum_blocks(
            x, y, expert_x, len(blocks), replace(WALK, multiprocessors=multiprocessors)
        )

    sets, flops = draws((tokens, d), (tokens, f)), 2 * d * f * tokens
    found = products(sets, operands, kernel, bf16, exact_of_fp8, flops)
    if used > 1:
        found.append(Variant("bf16 by kernel", own_bf16, sets, flops, close_to(exact, sets)))
    return found


def products(
    sets: Sets, operands: Callable, kernel: Callable, bf16: Callable, exact: Callable, flops: float
) -> list[Variant]:
    """The kernel on the FP8 operands of these sets, and XLA's BF16 product on the sets."""
    narrow = made_of(operands, sets)
    return [
        Variant("fp8", kernel, narrow, flops, close_to(exact, narrow)),
        Variant("bf16", bf16, sets, flops),
    ]


# --- passes that quantise ---


def quantize_case(matrix: tuple[int, int], swiglu_output: tuple[int, int]) -> list[Variant]:
    """A copy first, then the kernels, then XLA's own."""
    (t, d), (u, f) = matrix, swiglu_output
    wide, narrow = t * d * 2, t * d * (1 + 4 / BLOCK)  # bytes in bfloat16, and in FP8 with scales
    wide_h, narrow_h = u * f * 2, u * f * (1 + 4 / BLOCK)
    x, gate_up = draws((t, d)), draws((u, 2 * f))
    q, q_gate_up = made_of(rows_of, x), made_of(rows_of, gate_up)
    w = made_of(lambda x: (x.astype(jnp.float32),), x)

    def both_of(x):
        return *rows_of(x), *columns_of(x)

    def of_kept(q, s):
        return swiglu(dequantized(q, s))

    def kernel(name, run, sets, work, definition, prepare=None, allowed=0.0):
        return Variant(name, run, sets, work, same_as(definition, prepare, sets, allowed))

    f32 = "float32"
    both = partial(passes.quantize_both, row_scale=f32, column_scale=f32)
    rows, columns = (
        partial(each, scale=f32) for each in (passes.quantize_rows, passes.quantize_columns)
    )
    retile = partial(passes.retile, scale=f32)
    h_rows, h_columns = (
        partial(each, gate_T1=None, scale=f32) for each in (swiglu_rows, swiglu_columns)
    )
    h_bytes = 2 * wide_h + narrow_h, 3 * narrow_h
    return [
        Variant("copy", lambda x: x + 1, x, 2 * wide),
        kernel("rows", rows, x, wide + narrow, rows_of),
        kernel("columns", columns, x, wide + narrow, columns_of),
        kernel("both tilings", both, x, wide + 2 * narrow, both_of),
        kernel("weight", weight, w, 2 * wide + t * d, weight_of),
        kernel("columns of rows", retile, q, 2 * narrow, columns_of, dequantized),
        kernel("SwiGLU rows", h_rows, gate_up, h_bytes[0], rows_of, swiglu, BYTES),
        kernel("SwiGLU columns", h_columns, q_gate_up, h_bytes[1], columns_of, of_kept, BYTES),
        Variant("weight through XLA", weight_of, w, 2 * wide + t * d),
        Variant("rows through XLA", rows_of, x, wide + narrow),
        Variant("both tilings through XLA", both_of, x, wide + 2 * narrow),
    ]


# --- inputs and definitions ---


def draws(*shapes: tuple[int, ...]) -> Sets:
    """Sets of random bfloat16 arrays, so many that their FP8 ones leave the L2 between two uses."""
    elements = sum(map(math.prod, shapes))
    count = min(MOST_SETS, max(2, math.ceil(SETS_BYTES / elements)))
    keys = jax.random.split(jax.random.key(0), 1 if elements < FEW_ELEMENTS else count)

    @jax.jit
    def one(key):
        own = zip(jax.random.split(key, len(shapes)), shapes, strict=True)
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in own)

    return [one(key) for key in keys]


def made_of(make: Callable[..., tuple], sets: Sets) -> Sets:
    made = jax.jit(make)
    return [made(*each) for each in sets]


def rows_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By definition, tiles 1x128 as kernels lay them out."""
    made = fp8.quantize(x, (1, BLOCK))
    return made.values, made.scales.T


def columns_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By definition, tiles 128x1, transposed."""
    made = fp8.quantize(x, (BLOCK, 1))
    return made.values.T, made.scales


def weight(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    made = quantize_weight(w, "float32")
    return made.values, made.scales


def weight_of(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By definition."""
    made = fp8.quantize(w, (BLOCK, BLOCK))
    return made.values, made.scales


def dequantized(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Either of them as it lies, in float32."""
    return fp8.Blocked(values, scales.T, (1, BLOCK)).dequantize()


# --- checks ---


def close_to(exact: Callable[..., jax.Array], sets: Sets) -> Callable[[Any], Errors]:
    """Products against those in float32."""

    @jax.jit
    def off(y, *operands):
        y, r = y.astype(jnp.float32), exact(*operands)
        square = jnp.square(y - r).sum()
        # The second is 1 - 2 sum(x y) / sum(x^2 + y^2), without its cancellation.
        return jnp.sqrt(square / jnp.square(r).sum()), square / (y * y + r * r).sum()

    def check(y):
        error, diff = map(float, off(y, *sets[0]))
        wrong = not (error <= ERROR and diff < DIFF)  # NaN is wrong too
        return {"relative error": error, "diff": diff, "wrong": wrong}

    return check


def same_as(
    definition: Callable, prepare: Callable | None, sets: Sets, allowed: float
) -> Callable[[Any], Errors]:
    """Bytes against the definition's under jit. `prepare` has a program of its own, since in one
    with the rest XLA may leave out its rounding to bfloat16.
    """

    def check(made):
        args = (jax.jit(prepare)(*sets[0]),) if prepare else sets[0]
        pairs = list(zip(made, jax.jit(definition)(*args), strict=True))
        differing = sum(int((raw(a) != raw(b)).sum()) for a, b in pairs)
        share = differing / sum(a.nbytes for a, _ in pairs)
        return {"differing bytes": share, "wrong": share > allowed}

    return check


def raw(x: jax.Array) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)
