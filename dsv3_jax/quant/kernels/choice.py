"""Whether kernels multiply: what was asked for, and what this machine can run."""

import jax

from dsv3_jax.config.quant import Kernels

OLDEST_JAX = (0, 11)
HOPPER = "9.0"


def chosen(asked: Kernels) -> bool:
    """Whether kernels multiply. ValueError for "on" where none can run."""
    missing = None if asked == "off" else lacking()
    if missing and asked == "on":
        raise ValueError(f"quant.kernels is on; allowed here: auto, off, since {missing}")
    return asked != "off" and not missing


def lacking() -> str | None:
    """What kernels want and do not find, in words."""
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"kernels need jax 0.11 or later, and this is {jax.__version__}"
    if jax.config.jax_enable_x64:  # Pallas' loops count in 32 bits
        return "kernels need JAX without JAX_ENABLE_X64"
    capabilities = {getattr(d, "compute_capability", None) for d in jax.devices()}
    if capabilities != {HOPPER}:
        return f"kernels need Hopper GPUs, and devices here are {jax.devices()[0].device_kind}"
    return None
