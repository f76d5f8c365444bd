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
    """Of linears. dtype: in train.dtype, which f32 and bf16 set; fp8: E4M3 in blocks of 1x128 and
    128x128; fp8_pow2: with powers of two as scales; fp8_per_tensor (one scale each) and
    fp8_square_gradients (128x128 for them too) are for comparison"""

    def __post_init__(self) -> None:
        check_types("quant", self)


DTYPES = {"f32": "float32", "bf16": "bfloat16"}
