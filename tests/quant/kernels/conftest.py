"""Kernels beside a definition that divides as NVIDIA's GPUs do."""

import jax.numpy as jnp
import pytest

from dsv3_jax.quant import fp8


@pytest.fixture(autouse=True)
def quotients_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's division there, `div.full`, multiplies with the inverse, and so do the kernels. Where a
    quotient lies between two numbers of 8 bits that may be another number than a CPU's division
    gives; all else is compared bit for bit.
    """

    def quotients(parts, scales):
        inverse = fp8._per_block(1 / scales)
        return parts * jnp.where(jnp.isfinite(parts), inverse, 1)

    monkeypatch.setattr(fp8, "_quotients", quotients)
