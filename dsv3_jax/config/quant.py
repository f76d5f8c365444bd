"""In which precision the linears are trained."""

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check_types

RecipeName = Literal[
    "dtype", "f32", "bf16", "fp8", "fp8_pow2", "fp8_per_tensor", "fp8_square_gradients"
]


@dataclass(frozen=True)
class QuantConfig:
    """Low precision (report 3.3)."""

    recipe: RecipeName = "dtype"
    """dtype: products in train.dtype; f32, bf16: all in that dtype, whatever train.dtype says; fp8:
    linears in E4M3, 1x128 and 128x128; fp8_pow2: all scales powers of two; for comparison,
    fp8_per_tensor: one scale a tensor, and fp8_square_gradients: gradients in 128x128"""

    def __post_init__(self) -> None:
        check_types("quant", self)


DTYPES = {"f32": "float32", "bf16": "bfloat16"}
