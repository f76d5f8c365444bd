"""The machine at hand as a `Hardware`, measured in about a second. Loads JAX when called."""

import os
import time
from collections.abc import Callable

from dsv3_jax.plan.hardware import Hardware
from dsv3_jax.plan.kernel_rates import Figure, GemmRate, LinkRate

SIDE = 1024  # of the square products
COPIED = 2**26  # bytes, more than caches hold
MEASURED = "measured here"
SHARED = f"{MEASURED}, shared by the emulated devices"


def measured_cpu(devices: int) -> Hardware:
    """One of so many emulated devices, which share the cores evenly: 1/devices of each figure.

    Links are copies in memory. FP8 is computed as float32 products of expanded blocks.
    """
    import jax.numpy as jnp

    wide = _share(_product_rate(jnp.float32), devices)
    half = _share(_product_rate(jnp.bfloat16), devices)
    copied = _share(_copy_rate(), devices)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gemm = GemmRate(SIDE, SIDE, SIDE, wide.value, source=MEASURED)
    links = (
        LinkRate(1, "nvlink", copied.value, copied.value, MEASURED),
        LinkRate(1, "ib", copied.value, copied.value, MEASURED),
    )
    return Hardware(
        name="cpu",
        bf16=max(wide, half, key=lambda figure: figure.value),
        fp8=wide,
        memory=Figure(whole / devices, SHARED),
        memory_bandwidth=copied,
        streamed=copied,
        nvlink=copied,
        ib=copied,
        devices_per_node=Figure(devices, "emulated"),
        sms=Figure(os.cpu_count() or 1, MEASURED),
        comm_sms=Figure(0, "none"),
        gemm_fp8=(gemm,),
        gemm_bf16=half,
        gemm_float32=wide,
        attention=half,
        exchange=links,
        low_latency=(),
        assumed=(
            f"peaks are what products of {SIDE:,} × {SIDE:,} achieve",
            "emulated devices have 1/devices of the machine each, all the time",
            "FP8 products are float32 ones; links are copies in memory",
        ),
    )


def _share(rate: float, devices: int) -> Figure:
    return Figure(rate / devices, SHARED if devices > 1 else MEASURED)


def _product_rate(dtype: object) -> float:
    """FLOP/s of a square product."""
    import jax
    import jax.numpy as jnp

    x = jax.device_put(jnp.ones((SIDE, SIDE), dtype), jax.devices("cpu")[0])
    product = jax.jit(jnp.matmul)
    return 2 * SIDE**3 / _best(lambda: product(x, x).block_until_ready())


def _copy_rate() -> float:
    """Bytes/s that are copied; each is read and written."""
    import numpy as np

    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    return COPIED / _best(lambda: np.copyto(target, source))


def _best(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some runs behind a first one, which compiles."""
    run()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
