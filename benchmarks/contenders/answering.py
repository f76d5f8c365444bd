"""What every contender's process does: it prepares, then runs its work for every line it reads.

Imports nothing but the standard library: contenders run under interpreters of their own.
"""

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(work: Callable[[], dict[str, Any] | None], *, warm_up: int, **facts) -> None:
    """Warms up, tells `facts`, and then for every line on stdin runs `work` once and prints its
    seconds, the highest resident memory since the warm-up, and what figures it returns, which win
    over these, a line of JSON each.
    """
    begun = time.perf_counter()
    for i in range(warm_up):
        if i == warm_up - 1:
            give_memory_back()
        work()
    forget_peak_memory()
    facts |= {"python": platform.python_version(), "warm_up_seconds": time.perf_counter() - begun}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        more = work() or {}
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory(), **more}), flush=True)


def give_memory_back() -> None:
    """What compilation left free is no part of the steps, but the tuned allocator would keep it.
    Before the last run of the warm-up, which takes what it needs anew, so that no measured one has
    to (glibc).
    """
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory(process: int | str = "self") -> None:
    """The high-water mark starts again from what is resident now (Linux)."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_memory(process: int | str = "self") -> int:
    """Highest resident memory since then, in bytes."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
