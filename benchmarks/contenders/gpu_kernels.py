"""The kernels of gpu_static.py at sizes of V3, lowered for CUDA."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.quant.kernels import bf16_gemm, rows_gemm, wgrad_gemm
from dsv3_jax.quant.kernels import quantize as passes
from dsv3_jax.quant.kernels.swiglu import swiglu_columns, swiglu_rows
from dsv3_jax.quant.kernels.weights import quantize_weight

T, D, F = 4096, 7168, 2048
E4M3, WIDE, SCALE, INDEX = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32, jnp.int32

Shape = tuple[tuple[int, ...], Any]
TABLE: dict[str, tuple[Callable[..., Any], list[Shape]]] = {
    "rows": (lambda x: passes.quantize_rows(x, "float32"), [((T, D), WIDE)]),
    "columns": (lambda x: passes.quantize_columns(x, "float32"), [((T, D), WIDE)]),
    "both": (lambda x: passes.quantize_both(x, "float32", "float32"), [((T, D), WIDE)]),
    "weight": (lambda w: quantize_weight(w, "float32"), [((D, F), jnp.float32)]),
    "retile": (
        lambda q, s: passes.retile(q, s, "float32"),
        [((T, D), E4M3), ((D // 128, T), SCALE)],
    ),
    "swiglu_rows": (
        lambda x, gate: swiglu_rows(x, gate, "float32"),
        [((T, 2 * F), WIDE), ((T, 1), SCALE)],
    ),
    "swiglu_columns": (
        lambda q, s, gate: swiglu_columns(q, s, gate, "float32"),
        [((T, 2 * F), E4M3), ((2 * F // 128, T), SCALE), ((T, 1), SCALE)],
    ),
    "multiply_rows": (
        lambda *operands: rows_gemm.multiply_rows(*operands, jnp.bfloat16),
        [
            ((T, D), E4M3),
            ((D // 128, T), SCALE),
            ((1, F, D), E4M3),
            ((1, F // 128, D // 128), SCALE),
            ((T // 128,), INDEX),
        ],
    ),
    "multiply_columns": (
        wgrad_gemm.multiply_columns,
        [
            ((D, T), E4M3),
            ((T // 128, D), SCALE),
            ((F, T), E4M3),
            ((T // 128, F), SCALE),
            ((1,), INDEX),
            ((1,), INDEX),
        ],
    ),
    "multiply_bf16": (
        bf16_gemm.multiply_blocks,
        [((T, D), WIDE), ((1, D, F), WIDE), ((T // 128,), INDEX)],
    ),
    "multiply_bf16_transposed": (
        lambda *operands: bf16_gemm.multiply_blocks(*operands, transposed=True),
        [((T, F), WIDE), ((1, D, F), WIDE), ((T // 128,), INDEX)],
    ),
    "multiply_bf16_columns": (
        lambda *operands: bf16_gemm.sum_blocks(*operands, experts=1),
        [((T, D), WIDE), ((T, F), WIDE), ((T // 128,), INDEX)],
    ),
}


def modules(name: str) -> Iterator[bytes]:
    """What JAX hands to Mosaic GPU's compiler."""
    run, shapes = TABLE[name]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    program = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    for operation in inside(program.compiler_ir("stablehlo").operation):
        attributes = operation.attributes
        if "call_target_name" in attributes and "mosaic_gpu" in str(attributes["call_target_name"]):
            yield attributes["mhlo.backend_config"]["module"].value_bytes


def inside(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for each in block:
                yield each.operation
                yield from inside(each.operation)
