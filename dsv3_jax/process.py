"""What a computing command's process is given before JAX is imported: glibc's allocator set for
large arrays, Python's collector for many objects, and a folder for compiled programs.

On CPUs XLA asks malloc for all temporary memory of a program at every call, and glibc hands large
blocks back to the system each time: a third of a training step went into new pages. The settings
keep memory, in huge pages. glibc reads them when a process begins, so the command starts itself
once more with them. `DSV3_ALLOCATOR=default` leaves the allocator alone, and so do settings of the
user's own.
"""

import ctypes
import gc
import os
import platform
import re
import sys
from collections.abc import Mapping

from dsv3_jax.cli import fail
from dsv3_jax.files import cache_folder

SWITCH = "DSV3_ALLOCATOR"
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",  # XLA's threads would each keep a heap of their own
    # XLA's compiler threads wait for that heap's lock, 3 s of a cold start's compilation of 22 s:
    # each keeps 200 blocks of a size instead of 7. With 60,000 a process grew to 2.2 and 9.4 GB.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=200",
}
MAX_EMULATED = 4096
# Emulated devices wait for each other, and XLA ends a process whose devices have waited 40 s: one
# that has most of the tokens may well take longer, and so does a laptop that slept.
PATIENCE = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=86400",
    "--xla_cpu_collective_timeout_seconds=86400",
)
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def prepare() -> None:
    """For a command that computes, before its imports and work: may start the process anew.

    SystemExit 2 for an unknown value of the switch.
    """
    os.environ.update(compilation_cache(os.environ))
    # Modules and traces stay: looking for garbage at every 700 objects took 0.4 s of a start's 4.
    # All are looked through after 440,000 instead of 93,000 (counted).
    gc.set_threshold(20_000, 5, 2)
    chosen = os.environ.get(SWITCH, "")
    if chosen not in ("", "default"):
        fail(f"{SWITCH} is {chosen!r}; allowed: 'default', or none")
    if not chosen and allocator_is_ours(os.environ) and not {"-h", "--help"} & {*sys.argv}:
        # Once: with the settings in the environment it is no longer ours to choose them.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})


def allocator_is_ours(environment: Mapping[str, str]) -> bool:
    """Whether a command may choose glibc's settings: on Linux with glibc, without an accelerator,
    and where the user has chosen none.
    """
    if platform.libc_ver()[0] != "glibc" or any(map(os.path.exists, ACCELERATORS)):
        return False
    if environment.get("JAX_PLATFORMS", "cpu") not in ("cpu", ""):
        return False
    return not ({*SETTINGS, "LD_PRELOAD"} & {name for name, value in environment.items() if value})


def compilation_cache(environment: Mapping[str, str]) -> dict[str, str]:
    """JAX's variables for compiled programs kept between runs; what the user has set stays."""
    folder = cache_folder()
    if folder is None:
        return {}
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return {name: environment.get(name, value) for name, value in defaults.items()}


def emulate(devices: int | None) -> None:
    """So many devices on the CPU, asked for before JAX has begun; None leaves them as they are.

    ValueError for a number that cannot be, or where the environment asks for another one.
    """
    if devices is not None and not 1 <= devices <= MAX_EMULATED:
        raise ValueError(f"--devices is {devices}; allowed: 1 to {MAX_EMULATED:,}")
    flags = os.environ.get("XLA_FLAGS", "")
    asked = {
        "XLA_FLAGS": re.findall(r"--xla_force_host_platform_device_count=(\S+)", flags)[-1:],
        "JAX_NUM_CPU_DEVICES": [os.environ[n] for n in ("JAX_NUM_CPU_DEVICES",) if n in os.environ],
    }
    for name, numbers in asked.items():
        for number in numbers:
            _check_asked(name, number, devices)
    if devices is None:
        return
    os.environ["XLA_FLAGS"] = " ".join([flags, *PATIENCE]).strip()
    import jax

    jax.config.update("jax_platforms", "cpu")
    if not asked["XLA_FLAGS"]:
        jax.config.update("jax_num_cpu_devices", devices)


def _check_asked(name: str, number: str, devices: int | None) -> None:
    if not (number.isdecimal() and 1 <= int(number) <= MAX_EMULATED):
        raise ValueError(f"{name} asks for {number!r} CPU devices; allowed: 1 to {MAX_EMULATED:,}")
    if devices not in (None, int(number)):
        raise ValueError(
            f"--devices is {devices}, and {name} asks for {number} CPU devices; allowed: one of "
            "them"
        )


def check_devices() -> None:
    """Starts JAX. ValueError, one line, if it finds no device to compute on."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX finds no device (JAX_PLATFORMS is {platforms!r}): "
            f"{' '.join(str(error).split())[:200] or 'no platform could be started'}"
        ) from error


def give_back() -> None:
    """Hands memory that is free to the system: after a compilation, which leaves much (Linux)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
