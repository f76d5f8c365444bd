"""Recipes of low-precision training: how each GEMM rounds its operands, and what it keeps for the
backward pass (report 3.3).

A recipe maps classes of linears to rules; a class that it does not name computes in the
activations' dtype. Which linear is of which class, `model/precision.py` says. To try another recipe
is to add a table here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from dsv3_jax.quant.fp8 import Blocked, Scale, quantize, rounded


@dataclass(frozen=True)
class Operand:
    """How one operand of a GEMM is rounded."""

    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: one scale for the whole matrix"""
    fmt: str = "e4m3"
    scale: Scale = "float32"

    def quantize(self, x: jax.Array) -> Blocked:
        """x [..., D, F] in blocks; each matrix for itself."""
        return quantize(x, self.block or x.shape[-2:], self.fmt, self.scale)

    def rounded(self, x_xMD: jax.Array) -> jax.Array:
        """What the GEMM multiplies, float32; x is one matrix of x M rows, and no block of rows
        reaches over an M.
        """
        if self.block:
            return rounded(x_xMD, self.block, self.fmt, self.scale)
        x_XD = x_xMD.reshape(-1, x_xMD.shape[-1])
        return rounded(x_XD, x_XD.shape, self.fmt, self.scale).reshape(x_xMD.shape)


@dataclass(frozen=True)
class Rule:
    """The three GEMMs of a linear: Y = X W, dX = dY W^T, dW = X^T dY."""

    input: Operand
    """X of Fprop: blocks along the inner dimension"""
    weight: Operand
    """W of Fprop and, transposed, of Dgrad"""
    gradient: Operand
    """dY of Dgrad: blocks along the inner dimension"""
    wgrad_input: Operand
    """X of Wgrad, made from what was kept: blocks along the tokens"""
    wgrad_gradient: Operand
    """dY of Wgrad"""
    kept: Operand
    """What the forward pass keeps: X, or the arguments that X is computed from once more"""


Recipe = Mapping[str, Rule]

ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)


def _fine_grained(x: Scale, dy: Scale, kept: Operand) -> Rule:
    """Every operand E4M3: tiles for activations and gradients, squares for weights."""
    return Rule(
        input=Operand(ROW, scale=x),
        weight=Operand(SQUARE),
        gradient=Operand(ROW, scale=dy),
        wgrad_input=Operand(COLUMN, scale=x),
        wgrad_gradient=Operand(COLUMN, scale=dy),
        kept=kept,
    )


# What is re-tiled after it was stored, or travels between devices, has powers of two as scales.
FP8: Recipe = {
    "linear": _fine_grained("float32", "float32", Operand(ROW)),
    "after_attention": _fine_grained("pow2", "float32", Operand(ROW, "e5m6", "pow2")),
    "dispatched": _fine_grained("pow2", "float32", Operand(ROW, scale="pow2")),
    "after_swiglu": _fine_grained("float32", "float32", Operand(ROW)),
    "expert_after_swiglu": _fine_grained("float32", "pow2", Operand(ROW)),
}


def _every(recipe: Recipe, **changes: Operand) -> Recipe:
    return {name: replace(rule, **changes) for name, rule in recipe.items()}


def _with_scale(rule: Rule, scale: Scale) -> Rule:
    return Rule(**{name: replace(operand, scale=scale) for name, operand in vars(rule).items()})


# As was usual before: E4M3 forward, E5M2 backward.
_FORWARD, _BACKWARD = Operand(None), Operand(None, "e5m2")
_PER_TENSOR = Rule(_FORWARD, _FORWARD, _BACKWARD, _FORWARD, _BACKWARD, _FORWARD)

RECIPES: dict[str, Recipe] = {
    "dtype": {},
    "f32": {},
    "bf16": {},
    "fp8": FP8,
    "fp8_pow2": {name: _with_scale(rule, "pow2") for name, rule in FP8.items()},
    "fp8_per_tensor": dict.fromkeys(FP8, _PER_TENSOR),
    "fp8_square_gradients": _every(FP8, gradient=Operand(SQUARE), wgrad_gradient=Operand(SQUARE)),
}
