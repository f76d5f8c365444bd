"""Recipes of low-precision training: how each GEMM rounds its operands, and what it keeps for the
backward pass (report 3.3).

A recipe maps classes of linears to rules; a class that it does not name computes in the
activations' dtype. Which linear is of which class, `model/precision.py` says. Another recipe is
another table here, and its name in `config/quant.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from dsv3_jax.config.quant import WITH_KERNELS, QuantConfig, RecipeName
from dsv3_jax.quant.fp8 import Blocked, Scale, divided, fake_quantize, quantize
from dsv3_jax.quant.kernels.choice import chosen


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

    def fake_quantize(self, x_xMD: jax.Array) -> jax.Array:
        """What the GEMM multiplies, float32. x [x, M, D] are x groups of M rows: no tile reaches
        over a group's end, and one scale for the whole is one for all groups.
        """
        x = self.matrices(x_xMD)
        return fake_quantize(x, self.block or x.shape, self.fmt, self.scale).reshape(x_xMD.shape)

    def divided(self, x_xMD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same groups by blocks over their scales, and those scales: `fp8.divided`."""
        x = self.matrices(x_xMD)
        return divided(x, self.block or x.shape, self.fmt, self.scale)

    def matrices(self, x_xMD: jax.Array) -> jax.Array:
        """Groups of rows as `quantize` is to take them."""
        return x_xMD if self.block else x_xMD.reshape(-1, x_xMD.shape[-1])


@dataclass(frozen=True)
class Rule:
    """The three GEMMs of a linear: Y = X W, dX = dY W^T, dW = X^T dY."""

    input: Operand
    """X of Fprop: blocks along the inner dimension"""
    weight: Operand
    """W of Fprop and, transposed, of Dgrad"""
    grad_output: Operand
    """dY of Dgrad: blocks along the inner dimension"""
    wgrad_input: Operand
    """X of Wgrad, made from what was kept: blocks along the tokens"""
    wgrad_grad_output: Operand
    """dY of Wgrad"""
    kept: Operand
    """What the forward pass keeps: X, or behind SwiGLU its arguments. With recomputation
    (`train.remat`) these alone are kept, and X is computed and rounded again"""
    by_kernels: bool = False
    """Whether kernels for Hopper GPUs multiply instead of the definition"""

    def quantized(self, w: jax.Array) -> Blocked:
        """A weight [..., D, F] as products take it, by a kernel where one can."""
        if self.by_kernels and (self.weight.fmt, self.weight.block) == ("e4m3", SQUARE):
            from dsv3_jax.quant.kernels.weights import fits, quantize_weight  # not with older JAX

            if fits(w):
                return quantize_weight(w, self.weight.scale)
        return self.weight.quantize(w)


Recipe = Mapping[str, Rule]

OPERANDS = "input", "weight", "grad_output", "wgrad_input", "wgrad_grad_output", "kept"

ROW, COLUMN, SQUARE = (1, 128), (128, 1), (128, 128)


def _fine_grained(x_scale: Scale, dy_scale: Scale, kept: Operand) -> Rule:
    """Every operand E4M3: tiles for activations and gradients, squares for weights."""
    return Rule(
        input=Operand(ROW, scale=x_scale),
        weight=Operand(SQUARE),
        grad_output=Operand(ROW, scale=dy_scale),
        wgrad_input=Operand(COLUMN, scale=x_scale),
        wgrad_grad_output=Operand(COLUMN, scale=dy_scale),
        kept=kept,
    )


# Powers of two where the report has them: for the output projection's input, which is kept in E5M6
# and re-tiled from there, and for what travels between devices. Other inputs are re-tiled as well,
# with float32 scales, and so rounded twice.
FP8: Recipe = {
    "linear": _fine_grained("float32", "float32", Operand(ROW)),
    "after_attention": _fine_grained("pow2", "float32", Operand(ROW, "e5m6", "pow2")),
    "dispatched": _fine_grained("pow2", "float32", Operand(ROW, scale="pow2")),
    "after_swiglu": _fine_grained("float32", "float32", Operand(ROW)),
    "expert_after_swiglu": _fine_grained("float32", "pow2", Operand(ROW)),
}


def _changed(recipe: Recipe, operands: Iterable[str], **changes: Any) -> Recipe:
    """The same recipe with these operands of every rule changed."""
    return {
        kind: replace(rule, **{name: replace(getattr(rule, name), **changes) for name in operands})
        for kind, rule in recipe.items()
    }


# As was usual before: E4M3 forward, E5M2 backward.
_FORWARD, _BACKWARD = Operand(None), Operand(None, "e5m2")
_PER_TENSOR = Rule(
    input=_FORWARD,
    weight=_FORWARD,
    grad_output=_BACKWARD,
    wgrad_input=_FORWARD,
    wgrad_grad_output=_BACKWARD,
    kept=_FORWARD,
)

RECIPES: dict[RecipeName, Recipe] = {
    "dtype": {},
    "f32": {},
    "bf16": {},
    "fp8": FP8,
    "fp8_pow2": _changed(FP8, OPERANDS, scale="pow2"),
    "fp8_per_tensor": dict.fromkeys(FP8, _PER_TENSOR),
    "fp8_square_gradients": _changed(FP8, ["grad_output", "wgrad_grad_output"], block=SQUARE),
}


def recipe_of(quant: QuantConfig) -> Recipe:
    """The recipe that is asked for, with kernels where they are. ValueError as of `chosen`."""
    recipe = RECIPES[quant.recipe]
    by_kernels = quant.recipe in WITH_KERNELS and chosen(quant.kernels)
    return {kind: replace(rule, by_kernels=by_kernels) for kind, rule in recipe.items()}
