"""What traced and compiled programs say of themselves: bytes of a device, work, collectives."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.plan.compiled import Program

COLLECTIVES = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
Say = Callable[[str], None]


def compiled_with_time(lowered: Any, **options: Any) -> tuple[Any, float]:
    """A lowered program compiled, and the seconds that took."""
    start = time.monotonic()
    return lowered.compile(**options), time.monotonic() - start


def program_of(name: str, stages: str, compiled: Any, seconds: float, say: Say) -> Program:
    """What a compiled program takes and gives, and its collectives by kind; says that it is done.

    Work and collectives within a loop count once.
    """
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    say(f"{name:8} {stages}: {seconds:.0f} s")
    return Program(
        name,
        stages,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        float(costs.get("flops", 0.0)),
        dict(Counter(found)),
    )


def device_bytes(tree: Any) -> int:
    """Of arrays, or shapes, that know where they lie: on one device. All of those that know of no
    mesh.
    """
    return sum(math.prod(_shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shard(x: Any) -> tuple[int, ...]:
    return x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
