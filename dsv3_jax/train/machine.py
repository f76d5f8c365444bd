"""What this machine can do, to judge a run's speed by: matmul peak, description, memory."""

import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.quant.wide import wide_einsum

# On two busy cores 512 catches undisturbed moments (1.4 ms each); many cores need the larger one.
CPU_SIDES = (512, 2048)
ACCELERATOR_SIDES = (8192,)  # 1.1e12 operations: 1.4 ms on an H100, far above launching
SECONDS_PER_SIDE = 0.12
DTYPES = ("float32", "bfloat16", "float64")


def matmul_peak(dtype: str, sides: tuple[int, ...] | None = None) -> float:
    """FLOP/s of the fastest square matrix product seen on the first device, in about half a second.

    The product is the model's own: operands in `dtype`, result at least float32. `sides` are the
    matrix sizes tried, by default those that fill the device. ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if sides is None:
        sides = CPU_SIDES if jax.default_backend() == "cpu" else ACCELERATOR_SIDES
    with jax.enable_x64(True):
        return max(2 * side**3 / _fastest(dtype, side) for side in sides)


def _fastest(dtype: str, side: int) -> float:
    """Seconds of the quickest product. The first call compiles and is not counted."""
    # Made on the host, since compiling a program for it takes 0.1 s, as long as measuring.
    wave = np.sin(np.arange(1 << 16, dtype=np.float32)).astype(jnp.dtype(dtype))
    matrix = jax.device_put(np.resize(wave, (side, side)))
    product = jax.jit(partial(wide_einsum, "ij,jk->ik"))
    product(matrix, matrix).block_until_ready()
    best, end = float("inf"), time.perf_counter() + SECONDS_PER_SIDE
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def describe() -> str:
    """One line: processor, usable cores, JAX version, kind and number of devices, processes if
    there are several.
    """
    devices, backend, cores = jax.devices(), jax.default_backend(), _usable_cores()
    kind = devices[0].device_kind
    parts = (
        _processor(),
        _counted(cores, "core"),
        f"jax {jax.__version__}",
        _counted(len(devices), f"{backend} device") + (f" ({kind})" if backend != "cpu" else ""),
        *([f"{jax.process_count()} processes"] if jax.process_count() > 1 else []),
    )
    return ", ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _usable_cores() -> int:
    """Cores this process may run on; a container or batch job often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Model name of the processor, or its architecture where the system does not tell."""
    name = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), "")
    elif sys.platform == "darwin":
        query = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return " ".join(name.split()) or platform.machine()


def memory_size() -> int:
    """Bytes of the first device's memory; on a CPU, of the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_peak_memory() -> int | None:
    """Largest memory in use on any device of this process so far, in bytes; None on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, which on Linux starts at the peak of the process that launched this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
