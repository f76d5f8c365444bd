"""In which precision the linears are trained."""

from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config.fields import check_types

RecipeName = Literal[
    "dtype", "f32", "bf16", "fp8", "fp8_pow2", "fp8_per_tensor", "fp8_square_gradients"
]

Kernels = Literal["auto", "on", "off"]

WITH_KERNELS: tuple[RecipeName, ...] = ("fp8", "fp8_pow2")  # E4M3 in tiles and squares


@dataclass(frozen=True)
class QuantConfig:
    """Low precision (report 3.3)."""

    recipe: RecipeName = "dtype"
    """Of linears. dtype: as train.dtype; f32, bf16: these, and train.dtype too; fp8: E4M3 in blocks
    of 1x128 and 128x128; fp8_pow2: all scales powers of two. For comparison, fp8_per_tensor: one
    scale a tensor, gradients E5M2; fp8_square_gradients: gradients in blocks of 128x128 as well"""

    kernels: Kernels = "auto"
    """Who multiplies FP8: off: the definition, in float32; on: kernels for Hopper GPUs (H100, H200)
    where sizes are multiples of 128; auto: on if this is such a GPU, else off"""

    def __post_init__(self) -> None:
        check_types("quant", self)
        if self.kernels == "on" and self.recipe not in WITH_KERNELS:
            raise ValueError(
                f"quant.kernels is on, and no kernel multiplies for quant.recipe {self.recipe}; "
                f"allowed with it: {', '.join(WITH_KERNELS)}"
            )


DTYPES = {"f32": "float32", "bf16": "bfloat16"}
