"""Kernels without a GPU: interpreted on the CPU, and lowered for one."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"JAX {jax.__version__} does not interpret kernels of Mosaic GPU; 0.11.2 does",
)


def interpreted(run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)` under jit, its kernels interpreted."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            return jax.block_until_ready(jax.jit(lambda *args: run(*args))(*args))
    except BaseException:  # or every later interpretation in this process would fail as well
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise


def lowered(run: Callable[..., Any], *args: Any) -> str:
    """Text of the program of `run(*args)` for a GPU of NVIDIA; the kernels are in it."""
    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
